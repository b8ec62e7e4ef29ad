"""Time in which a watcher was able to watch."""

import time


class WatchClock:
    """Seconds that grow by at most `most` between two looks, so that a watcher that was itself stopped, or a machine
    that was asleep, blames nobody for it. Look often."""

    def __init__(self, most: float = 2.0):
        self._most = most
        self._last = time.monotonic()
        self._seconds = 0.0

    def now(self) -> float:
        """Seconds since this clock was made."""
        real = time.monotonic()
        self._seconds += min(real - self._last, self._most)
        self._last = real
        return self._seconds
