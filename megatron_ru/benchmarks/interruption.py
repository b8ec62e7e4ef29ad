"""Signals that end a run early, without what it has measured."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM raises KeyboardInterrupt in the main thread.

    Later ones do nothing, so that what is written on the way out is written whole: `timeout` sends its signal twice,
    to the process and to its group.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came."""
        self._before: dict[int, Any] = {}

    @property
    def came(self) -> bool:
        """Whether there was one."""
        return self.number is not None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            raise KeyboardInterrupt
