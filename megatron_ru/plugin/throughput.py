"""Tokens a second, TFLOP/s, MFU and peak memory: in Megatron's log line, in TensorBoard and in `--ru-metrics`.

The clock is read where the loss of a logged step has been read already, so that the device is waited for no more often
than without it.
"""

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

from megatron_ru.models.step_flops import mfu, peak_tflops, shape_of_arguments
from megatron_ru.plugin.step_measurement import device_name, memory_gib
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

_REASON = "Megatron tells TFLOP/s alone, and nothing to what is not its own writer"


class Throughput:
    """The speed since the line before, without evaluations and saves; of the first line since the first step began."""

    def __init__(self) -> None:
        self._device = "cpu" if CPU_DEVICE.installed else "cuda"
        self._iteration = 0
        self._measured = 0
        self._since: float | None = None
        self._samples = 0
        self._paused = 0.0
        self._found: dict[str, float] = {}

    def seams(self) -> list[Seam]:
        """The seams on steps, on what is no training, and on the log."""
        training = "megatron.training.training"
        return [
            Seam(target=f"{training}:train_step", make=self._before_first_step, reason=_REASON),
            Seam(
                target=f"{training}:training_log",
                make=self._before_log,
                expects=("iteration",),
                reason=_REASON,
            ),
            Seam(target=f"{training}:print_rank_last", make=self._with_speed, reason=_REASON, optional=True),
            *(
                Seam(target=f"{training}:{name}", make=self._aside, reason=_REASON, optional=True)
                for name in ("evaluate_and_print_results", "save_checkpoint_and_time")
            ),
        ]

    def report(self) -> dict[str, float]:
        """`tokens_per_second` over all GPUs, `tflop_s_per_gpu`, `mfu` (0 to 1) and `peak_memory_gib` of this GPU since
        the start of the process, for the iteration that is being logged; what is not known is left out.

        To be called when the loss of that iteration has been read.
        """
        if self._measured != self._iteration and self._since is not None:
            self._measured = self._iteration
            self._measure()
        return self._found

    def _measure(self) -> None:
        from megatron.training import get_args, get_tensorboard_writer

        args, now = get_args(), time.perf_counter()
        assert self._since is not None
        seconds = now - self._since - self._paused
        tokens = (args.consumed_train_samples - self._samples) * args.seq_length
        self._since, self._paused, self._samples = now, 0.0, args.consumed_train_samples
        self._found = {}
        if seconds > 0 and tokens > 0:
            self._found["tokens_per_second"] = tokens / seconds
            shape = shape_of_arguments(args)
            if shape is not None:
                flops = shape.flops_per_token * tokens
                self._found["tflop_s_per_gpu"] = flops / seconds / args.world_size / 1e12
                share = mfu(flops, seconds, args.world_size, peak_tflops(device_name(self._device)))
                if share is not None:
                    self._found["mfu"] = share
        self._found |= {name: value for name, value in memory_gib(self._device).items() if name == "peak_memory_gib"}
        writer = get_tensorboard_writer()
        if writer is not None:
            for name, value in self._found.items():
                writer.add_scalar(f"ru/{name}", value, self._iteration)

    def _before_first_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train_step(*arguments: Any, **keywords: Any) -> Any:
            if self._since is None:
                from megatron.training import get_args

                self._since, self._samples = time.perf_counter(), get_args().consumed_train_samples
            return original(*arguments, **keywords)

        return train_step

    def _before_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        place = list(inspect.signature(original).parameters).index("iteration")

        @functools.wraps(original)
        def training_log(*arguments: Any, **keywords: Any) -> Any:
            self._iteration = keywords["iteration"] if "iteration" in keywords else arguments[place]
            return original(*arguments, **keywords)

        return training_log

    def _with_speed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def print_rank_last(message: Any, *arguments: Any, **keywords: Any) -> Any:
            # The line of a step, whose losses have been read to make it.
            if isinstance(message, str) and " consumed samples:" in message and message.endswith("|"):
                message += sentence(self.report())
            return original(message, *arguments, **keywords)

        return print_rank_last

    def _aside(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                self._paused += time.perf_counter() - began

        return call


def sentence(found: dict[str, float]) -> str:
    """The same for the end of a line of Megatron's log; empty where nothing is known."""
    parts = []
    if "tokens_per_second" in found:
        parts.append(f" tokens/s: {found['tokens_per_second']:,.0f} |")
    if "tflop_s_per_gpu" in found:
        parts.append(f" TFLOP/s/GPU: {found['tflop_s_per_gpu']:.4g} |")
    if "mfu" in found:
        parts.append(f" MFU: {100 * found['mfu']:.1f}% |")
    if "peak_memory_gib" in found:
        parts.append(f" peak memory (GiB): {found['peak_memory_gib']:.1f} |")
    return "".join(parts)
