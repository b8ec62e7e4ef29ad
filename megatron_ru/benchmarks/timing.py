"""Clocks: how long a call takes on a device.

A clock is given a source of steps. Each step is a call that is made once; neighbouring steps work on different input
sets, several times as large together as the cache, so that what is measured is memory and not the cache.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_ru.benchmarks.result import Timing

Step = Callable[[], object]

# A repeat is this long at least, so that the resolution of the clock and the first call do not matter.
_REPEAT_SECONDS = 2e-3
_MOST_CALLS = 32
_FEWEST_REPEATS, _MOST_REPEATS = 3, 50
# Cycles a second of the fastest clock that a GPU here runs at; a spin that is too long only costs time.
_SPIN_CYCLES = 2.0e9
_LONGEST_SPIN = 0.1


class Source(Protocol):
    """Where steps come from."""

    rotation: int
    """How many input sets there are."""
    most: int
    """How many steps fit into memory at once."""

    def steps(self, count: int) -> Sequence[Step]:
        """`count` steps, to be called once each, in order. What making them takes is not timed."""
        ...


class Clock(Protocol):
    """A way to time."""

    name: str

    def measure(self, source: Source, seconds: float) -> Timing:
        """The time of a step, from repeats for about `seconds`, warm-up apart."""
        ...


class WallClock:
    """The host's clock, for work that is done when a call returns."""

    name = "wall clock"

    def measure(self, source: Source, seconds: float) -> Timing:
        """Median over repeats of the time of a call."""
        once = _wall_seconds(source.steps(1))
        count = _calls(once, source)

        def repeat() -> float:
            return _wall_seconds(source.steps(count))

        return _repeated(repeat, count, seconds)


class QueuedClock:
    """CUDA events around calls that wait in the queue while the GPU spins, so that the host is ahead of it.

    What is measured is the GPU's time for work that stands back to back, as in a training step that keeps it busy. An
    op that waits for the GPU within a call empties the queue, and its pauses are measured, as they would be felt.
    """

    name = "queued"

    def measure(self, source: Source, seconds: float) -> Timing:
        """Median over repeats of the time of a call."""
        _on_gpu(source.steps(source.rotation))
        once = _on_gpu(source.steps(source.rotation))
        count = _calls(once.seconds / source.rotation, source)
        spin = 1.5 * once.host_seconds / source.rotation * count

        def repeat() -> float:
            return _on_gpu(source.steps(count), spin=spin).seconds

        return _repeated(repeat, count, seconds)


class LaunchedClock:
    """CUDA events around calls as the host makes them: where it is the slower one, its time is what is measured."""

    name = "launched"

    def measure(self, source: Source, seconds: float) -> Timing:
        """Median over repeats of the time of a call."""
        _on_gpu(source.steps(source.rotation))
        count = _calls(_on_gpu(source.steps(source.rotation)).seconds / source.rotation, source)

        def repeat() -> float:
            return _on_gpu(source.steps(count)).seconds

        return _repeated(repeat, count, seconds)


class GraphClock:
    """CUDA events around replays of a CUDA graph that holds one step for each input set."""

    name = "graph"

    def measure(self, source: Source, seconds: float) -> Timing:
        """Median over repeats of the time of a call; raises RuntimeError when the steps cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A backward runs on the stream of its forward, so the steps are made where they are captured.
        with torch.cuda.stream(stream):
            for _ in range(2):
                for step in source.steps(source.rotation):
                    step()
            steps = source.steps(source.rotation)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for step in steps:
                    step()
            _on_gpu([graph.replay])
            once = _on_gpu([graph.replay]).seconds
            replays = max(1, min(_MOST_CALLS, round(_REPEAT_SECONDS / once)))

            def repeat() -> float:
                return _on_gpu([graph.replay] * replays, spin=1e-4).seconds

            timing = _repeated(repeat, replays * source.rotation, seconds)
        torch.cuda.current_stream().wait_stream(stream)
        return timing


CLOCKS: dict[str, Callable[[], Clock]] = {
    clock.name: clock for clock in (QueuedClock, GraphClock, LaunchedClock)
}  # what `--timing` chooses from on a GPU


def host_microseconds(run: Step, seconds: float = 0.1) -> float:
    """Median time in which the host makes a call, while the GPU works behind it."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[int] = []
    ends = time.perf_counter() + seconds
    while len(times) < 200 and (not times or time.perf_counter() < ends):
        # In bursts: a full queue would make the host wait for the GPU.
        for _ in range(20):
            begun = time.perf_counter_ns()
            run()
            times.append(time.perf_counter_ns() - begun)
        torch.cuda.synchronize()
    return sorted(times)[len(times) // 2] / 1e3


def _calls(seconds: float, source: Source) -> int:
    """How many calls of that length make a repeat."""
    wanted = max(source.rotation, round(_REPEAT_SECONDS / max(seconds, 1e-7)))
    return max(1, min(wanted, source.most, max(_MOST_CALLS, source.rotation)))


def _repeated(repeat: Callable[[], float], count: int, seconds: float) -> Timing:
    """Repeats until the time is used up, within the fewest and the most."""
    found: list[float] = []
    # A collection in the middle of a repeat would be measured.
    gc.collect()
    gc.disable()
    try:
        ends = time.perf_counter() + seconds
        while len(found) < _FEWEST_REPEATS or (len(found) < _MOST_REPEATS and time.perf_counter() < ends):
            found.append(repeat())
    finally:
        gc.enable()
    return Timing.of(found, count)


def _wall_seconds(steps: Sequence[Step]) -> float:
    started = time.perf_counter()
    for step in steps:
        step()
    return time.perf_counter() - started


@dataclass(frozen=True)
class _Run:
    seconds: float
    """Of the GPU."""
    host_seconds: float
    """Until the last call returned."""


def _on_gpu(steps: Sequence[Step], spin: float = 0.0) -> _Run:
    """The time of the steps on the GPU, which spins for `spin` seconds before them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if spin:
        torch.cuda._sleep(round(min(spin, _LONGEST_SPIN) * _SPIN_CYCLES))
    started = time.perf_counter()
    begin.record()
    for step in steps:
        step()
    end.record()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    return _Run(seconds=float(begin.elapsed_time(end)) / 1e3, host_seconds=host)
