"""What one process measures of its training steps, and the document that it leaves."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output
from megatron_ru.models.step_flops import FORMULA, MFU_FORMULA, Shape, mfu, peak_tflops
from megatron_ru.plugin.kernel_trace import Kernel, KernelTrace, by_cause, part_name
from megatron_ru.plugin.step_clock import StepClock, summary

DEFAULT_TRACED = range(8, 11)


def traced_steps(words: str | None) -> range:
    """The steps that `A:B` names, from 1, both included; steps 8 to 10 for None. Raises `UserError`."""
    if words is None:
        return DEFAULT_TRACED
    first, colon, last = words.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--ru-profile-steps {words}: expected FIRST:LAST, two steps of this run counted from 1; give for example "
            f"{DEFAULT_TRACED.start}:{DEFAULT_TRACED.stop - 1}"
        )
    return range(int(first), int(last) + 1)


class StepMeasurement:
    """Times every step and traces the kernels of a few; the same for our entry and for the peers of `bench train`.

    `begin`, `between` and `end` stand in each step.
    """

    def __init__(self, device: str, traced: range, traces: bool = True):
        self.device = device
        self.step = 0
        """Steps that have begun."""
        self.kernels: list[Kernel] = []
        self.gaps: dict[str, float] = {}
        """Microseconds of a traced step without a kernel, by what follows; empty on a CPU."""
        self._traced = traced
        self._traces = traces
        self._clock = StepClock(device)
        self._trace: KernelTrace | None = None

    @property
    def tracing_is_over(self) -> bool:
        """Whether the last traced step has just ended."""
        return self.step == self._traced.stop - 1

    def begin(self) -> None:
        """At the entry of a step, before gradients are zeroed."""
        self.step += 1
        if self._traces and self.step == self._traced.start:
            self._trace = KernelTrace(self.device)
            self._trace.begin()
        self._clock.begin()

    def between(self) -> None:
        """When the last backward has been asked for."""
        self._clock.between()
        if self._trace is not None:
            self._trace.begin_update()

    def end(self) -> None:
        """When the step has been asked for to its end."""
        self._clock.end(self.step)
        if self._trace is None:
            return
        self._trace.end_update()
        if self.tracing_is_over:
            self.close()

    def close(self) -> None:
        """Ends a trace that is still open: the run is shorter than it was thought."""
        if self._trace is not None:
            trace, self._trace = self._trace, None
            self.kernels, self.gaps = trace.end(self.step - self._traced.start + 1)

    def document(self, shape: Shape | None, tokens: int, gpus: int) -> dict[str, Any]:
        """Everything measured until now, for a file; `tokens` are those of a step over all GPUs."""
        times = summary(self._clock.times(), self._traced)
        found: dict[str, Any] = {
            "schema": 1,
            "device": self.device,
            "device_name": device_name(self.device),
            "gpus": gpus,
            "torch": torch.__version__,
            "steps": self.step,
            "tokens_per_step": tokens,
            "formula": FORMULA,
            "mfu_formula": MFU_FORMULA,
            **times,
            **memory_gib(self.device),
        }
        found |= rates(times, shape, tokens, gpus, peak_tflops(found["device_name"]))
        if self.kernels:
            found["traced_steps"] = f"{self._traced.start}:{min(self._traced.stop - 1, self.step)}"
            found["causes"] = by_cause(self.kernels)
            found["gap_microseconds"] = self.gaps
            found["kernels"] = [
                {"cause": kernel.cause, "part": part_name(kernel.in_update), **asdict(kernel)}
                for kernel in self.kernels
            ]  # fmt: skip
        return found


def rates(times: dict[str, Any], shape: Shape | None, tokens: int, gpus: int, peak: float | None) -> dict[str, Any]:
    """Tokens a second, TFLOP/s of each GPU and MFU, of whole steps and of forward and backward alone."""
    found: dict[str, Any] = {"peak_tflop_s": peak}
    if shape is not None:
        found["shape"] = asdict(shape)
        found["flops_per_step"] = shape.flops_per_token * tokens
        found["matmul_flops_per_step"] = shape.matmul_flops_per_token * tokens
        found["attention_flops_per_step"] = shape.attention_flops_per_token * tokens
    for prefix, name in (("", "step_seconds"), ("forward_backward_", "forward_backward_seconds")):
        seconds = times.get(name)
        if not seconds:
            continue
        found[f"{prefix}tokens_per_second"] = tokens / seconds
        if shape is not None:
            flops = found["flops_per_step"]
            found[f"{prefix}tflop_s_per_gpu"] = flops / seconds / gpus / 1e12
            found[f"{prefix}mfu"] = mfu(flops, seconds, gpus, peak)
    return found


def memory_gib(device: str) -> dict[str, float]:
    """The most memory that tensors and torch's allocator have taken on this GPU, in GiB (2³⁰ bytes)."""
    if device != "cuda":
        return {}
    return {
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def device_name(device: str) -> str:
    """The name of this GPU, or "CPU"."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def write_document(path: str | Path, document: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(document, stream, ensure_ascii=False, indent=1)
        stream.write("\n")
