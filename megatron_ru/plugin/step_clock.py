"""Times of training steps and of their two parts, taken on the device without making the host wait."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    step: int
    forward_backward: float
    """From the entry of the step, zeroing gradients included, to the end of the last backward."""
    whole: float
    """From the same entry to the end of the step: clipping, optimizer, weights handed out."""
    since_previous: float | None
    """From the entry of the step before to the entry of this one; None for the first."""


class _Mark(Protocol):
    def done(self) -> bool:
        """Whether its time is known without waiting."""

    def seconds_until(self, later: Any) -> float:
        """Waits where it must."""


class _CudaMark:
    """A place in the queue of the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())

    def seconds_until(self, later: "_CudaMark") -> float:
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3


class _WallMark:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def done(self) -> bool:
        return True

    def seconds_until(self, later: "_WallMark") -> float:
        return later._at - self._at


class StepClock:
    """Collects the times of the steps: `begin`, `between` and `end` in each of them."""

    def __init__(self, device: str):
        self._mark: type[_CudaMark] | type[_WallMark] = _CudaMark if device == "cuda" else _WallMark
        self._open: list[Any] = []
        self._waiting: deque[tuple[int, list[Any], Any]] = deque()
        self._last_begin: Any = None
        self._times: list[StepTime] = []

    def begin(self) -> None:
        """At the entry of a step."""
        self._open = [self._mark()]

    def between(self) -> None:
        """When a backward has been asked for; the last of them counts, since Megatron may run one again."""
        self._open[1:] = [self._mark()]

    def end(self, step: int) -> None:
        """When the step has been asked for to its end; `step` counts from 1."""
        if len(self._open) < 2:
            # A step without forward and backward is none.
            return
        self._open.append(self._mark())
        self._waiting.append((step, self._open, self._last_begin))
        self._last_begin = self._open[0]
        # What the device has passed is turned into numbers, so that a long run holds few events.
        while self._waiting and self._waiting[0][1][2].done():
            self._read()

    def times(self) -> list[StepTime]:
        """All of them; waits for the device."""
        while self._waiting:
            self._read()
        return self._times

    def _read(self) -> None:
        step, (begin, between, end), before = self._waiting.popleft()
        self._times.append(
            StepTime(
                step=step,
                forward_backward=begin.seconds_until(between),
                whole=begin.seconds_until(end),
                since_previous=None if before is None else before.seconds_until(begin),
            )
        )


def summary(times: Sequence[StepTime], without: range = range(0)) -> dict[str, float | int | None]:
    """Medians in seconds over the steps behind the warm-up, those in `without` left out.

    `step_seconds_low` and `step_seconds_high` are the quartiles. The warm-up is the first five steps, in a short run
    the first third.
    """
    warm_up = warm_up_steps(len(times))
    kept = [time for time in times[warm_up:] if time.step not in without]
    if not kept:
        return {"timed_steps": 0, "warm_up_steps": warm_up}
    whole = sorted(time.whole for time in kept)
    # The step after a traced one waits for the profiler to end.
    since = [t.since_previous for t in kept if t.since_previous is not None and t.step - 1 not in without]
    return {
        "timed_steps": len(kept),
        "warm_up_steps": warm_up,
        "forward_backward_seconds": median(time.forward_backward for time in kept),
        "update_seconds": median(time.whole - time.forward_backward for time in kept),
        "step_seconds": median(whole),
        "step_seconds_low": whole[len(whole) // 4],
        "step_seconds_high": whole[(3 * len(whole)) // 4 if len(whole) > 3 else -1],
        "begin_to_begin_seconds": median(since) if since else None,
    }


def warm_up_steps(steps: int) -> int:
    """How many steps at the beginning are not counted."""
    return min(5, steps // 3)
