"""A few steps under torch.profiler, summed up by what each kernel is there for."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ru.plugin.kernel_causes import CAUSES, cause_of

UPDATE = "megatron_ru update"
"""The name of the annotation around everything behind the last backward of a step."""


type Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All calls of one kernel (on a CPU: operator) in one of the two parts of a step."""

    name: str
    in_update: bool
    """Whether it ran behind forward and backward."""
    microseconds: float
    """For each step."""
    calls: float
    """For each step."""

    @property
    def cause(self) -> str:
        """One of `kernel_causes.CAUSES`."""
        return cause_of(self.name, self.in_update)


class KernelTrace:
    """Records from `begin` to `end`; between them `begin_update` and `end_update` say in each step where its update
    lies."""

    def __init__(self, device: str):
        self._device = device
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._update: Any = None

    def begin(self) -> None:
        """Starts recording, with nothing in the device's queue."""
        self._wait()
        self._profiler.__enter__()

    def begin_update(self) -> None:
        """Behind the last backward of a step."""
        self.end_update()
        self._update = torch.profiler.record_function(UPDATE)
        self._update.__enter__()

    def end_update(self) -> None:
        """At the end of a step."""
        if self._update is not None:
            self._update.__exit__(None, None, None)
            self._update = None

    def end(self, steps: int) -> tuple[list[Kernel], dict[str, float]]:
        """Stops and gives, of a mean step, its kernels, those that take longest first, and on a GPU the microseconds
        without any by what follows: forward and backward, the update, or the first kernel of the next step ("between
        steps")."""
        self.end_update()
        self._wait()
        self._profiler.__exit__(None, None, None)
        events = self._profiler.events()
        here, updates = _of_device(events, self._device)
        kernels = sorted(_sum_up(here, updates, self._device, steps), key=lambda kernel: -kernel.microseconds)
        spans = [(event.time_range.start, event.time_range.end) for event in here] if self._device == "cuda" else []
        return kernels, {part: time / steps for part, time in gaps(spans, updates).items()}

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def by_cause(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """`{"cause", "part", "microseconds", "calls"}` for each cause and part of a step that has any, in the order of
    CAUSES; `part` is "forward and backward" or "update"."""
    sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel in kernels:
        one = sums[kernel.cause, kernel.in_update]
        one[0] += kernel.microseconds
        one[1] += kernel.calls
    return [
        {"cause": cause, "part": part_name(late), "microseconds": found[0], "calls": found[1]}
        for late in (False, True)
        for cause in CAUSES
        if (found := sums.get((cause, late))) is not None
    ]


def part_name(in_update: bool) -> str:
    """In tables and files."""
    return "update" if in_update else "forward and backward"


def gaps(spans: Sequence[Span], updates: Sequence[Span]) -> dict[str, float]:
    """The time between the first and the last of the spans that none of them covers, by what follows it; spans that
    overlap count once."""
    found: dict[str, float] = defaultdict(float)
    covered: float | None = None
    left_update = False
    for start, end in sorted(spans):
        in_update = any(begin <= start <= last for begin, last in updates)
        if covered is not None and start > covered:
            part = "between steps" if left_update and not in_update else part_name(in_update)
            found[part] += start - covered
        left_update = in_update
        covered = end if covered is None else max(covered, end)
    return dict(found)


def _of_device(events: Any, device: str) -> tuple[list[Any], list[Span]]:
    """(what ran on the device, the spans of the updates there)."""
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    here = [event for event in events if event.device_type == wanted]
    updates = [(event.time_range.start, event.time_range.end) for event in here if event.name == UPDATE]
    return [event for event in here if not _is_annotation(event)], updates


def _sum_up(here: Sequence[Any], updates: Sequence[Span], device: str, steps: int) -> list[Kernel]:
    sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in here:
        took = event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
        start = event.time_range.start
        one = sums[event.name, any(begin <= start <= end for begin, end in updates)]
        one[0] += took
        one[1] += 1
    return [
        Kernel(name=name, in_update=late, microseconds=took / steps, calls=calls / steps)
        for (name, late), (took, calls) in sums.items()
    ]


def _is_annotation(event: Any) -> bool:
    """A range that somebody marked holds kernels that are counted by themselves."""
    name = str(event.name)
    marked = ("Optimizer.", "ProfilerStep#", "## Call CompiledFxGraph", "Torch-Compiled Region", "autograd::", UPDATE)
    return bool(getattr(event, "is_user_annotation", False)) or name.startswith(marked)
