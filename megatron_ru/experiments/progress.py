"""One line that tells how far a stage is."""

import sys
import time
from typing import TextIO


class Progress:
    """Rewrites one line in a terminal; elsewhere prints a new one for every tenth of the way."""

    def __init__(self, title: str, stream: TextIO | None = None):
        self._stream = sys.stdout if stream is None else stream
        self._title = title
        self._live = self._stream.isatty()
        self._tenth = -1
        self._began = time.monotonic()
        if not self._live:
            print(f"{title} ...", file=self._stream, flush=True)

    def __call__(self, text: str, share: float = 0.0) -> None:
        """Shows `text`; `share` of the stage, 0 to 1, is done."""
        if self._live:
            self._rewrite(f"{self._title}  {text}")
        elif int(10 * share) > self._tenth and share > 0:
            self._tenth = int(10 * share)
            print(f"  {text}", file=self._stream, flush=True)

    def done(self, text: str) -> None:
        """Ends the stage with a line that stays."""
        line = f"✓ {self._title}: {text} ({duration(time.monotonic() - self._began)})"
        if self._live:
            self._rewrite(line)
            print(file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)

    def _rewrite(self, line: str) -> None:
        # Back to the first column, and away with what is longer than the new line.
        self._stream.write(f"\r{line}\x1b[K")
        self._stream.flush()


def duration(seconds: float) -> str:
    """`12 s` or `3:05 min`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02} min"


class Remaining:
    """Estimates the time to the end of a run from the steps of this start."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def text(self, step: int, last: int) -> str:
        """`0:42 min left`, or nothing while little is known."""
        now = time.monotonic()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        first, since = self._first
        # One slow first step would promise hours.
        if step - first < max(2.0, 0.02 * (last - first)):
            return ""
        return f"{duration((now - since) / (step - first) * (last - step))} left"
