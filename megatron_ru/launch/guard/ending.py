"""Ending a set of processes: TERM, and KILL for those that are still there later."""

import signal
from collections.abc import Callable, Iterable

from megatron_ru.launch.guard.processes import Process, send

_UNKILLABLE_SECONDS = 10.0


class Ending:
    """One such ending. The processes are looked up at every step, since they go on starting others."""

    def __init__(self, find: Callable[[], Iterable[Process]], grace: float, now: float):
        self._find = find
        self._kill_at = now + grace
        self._told: set[tuple[int, int]] = set()

    def hurry(self, now: float) -> None:
        """KILL from now on."""
        self._kill_at = min(self._kill_at, now)

    def step(self, now: float) -> bool:
        """Sends what is due; True when nobody is left, or only such as the kernel does not let go."""
        left = [process for process in self._find() if process.alive]
        for process in left:
            if now >= self._kill_at:
                send(process, signal.SIGKILL)
            elif (process.pid, process.start) not in self._told:
                self._told.add((process.pid, process.start))
                send(process, signal.SIGTERM)
                # A stopped process answers to TERM once it goes on.
                send(process, signal.SIGCONT)
        return not left or now >= self._kill_at + _UNKILLABLE_SECONDS
