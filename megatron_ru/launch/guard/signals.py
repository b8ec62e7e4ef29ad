"""The signals that a guard has got and not yet dealt with."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ONE_SIGNAL_SECONDS = 1.0


class SignalBox:
    """Collects signals; the same one within a second counts once, since a shell, a scheduler and a terminal may each
    send it to everybody."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        """The first signal that asked for an end."""
        self._arrived: list[int] = []
        self._last: dict[int, float] = {}

    def put(self, number: int) -> None:
        """Notes a signal; safe inside a signal handler."""
        self._arrived.append(number)

    def take(self, now: float) -> list[signal.Signals]:
        """What has come since the last call."""
        arrived, self._arrived = self._arrived, []
        found = []
        for number in map(signal.Signals, arrived):
            if now - self._last.get(number, -_ONE_SIGNAL_SECONDS) >= _ONE_SIGNAL_SECONDS:
                found.append(number)
            self._last[number] = now
            self.first = self.first or number
        return found

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals of this process go here; afterwards they do what they did before."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.put(number)

        # Under nohup a hang-up is to be no news.
        before = {
            number: signal.signal(number, handler)
            for number in PASSED_ON
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
