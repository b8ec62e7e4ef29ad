"""`--ru-profile FILE`: times of every step and the kernels of a few, as JSON."""

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.step_flops import shape_of_arguments
from megatron_ru.plugin.step_measurement import StepMeasurement, traced_steps, write_document
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

_log = logging.getLogger(__name__)
_REASON = "Megatron times the parts of a step with barriers, and writes kernels for a viewer alone"


def step_profile_seams(args: Any) -> list[Seam]:
    """The seams of `--ru-profile`, none without it. Raises `UserError` for steps that are none."""
    if args.ru_profile is None:
        if args.ru_profile_steps is not None:
            raise UserError("--ru-profile-steps has no meaning without --ru-profile FILE: give both, or neither")
        return []
    return StepProfile(args.ru_profile, traced_steps(args.ru_profile_steps)).seams()


class StepProfile:
    """Rank 0 measures; the others train."""

    def __init__(self, path: str, traced: range):
        self._path = path
        self._traced = traced
        self._measurement: StepMeasurement | None = None
        self._losses: dict[int, Any] = {}

    def seams(self) -> list[Seam]:
        """The seams on the step and on the loop around it."""
        return [
            Seam(
                target="megatron.training.training:train_step",
                make=self._measured,
                expects=("forward_backward_func",),
                reason=_REASON,
            ),
            Seam(target="megatron.training.training:train", make=self._around_training, reason=_REASON),
        ]

    def _around_training(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train(*arguments: Any, **keywords: Any) -> Any:
            import torch.distributed

            if torch.distributed.get_rank() == 0:
                device = "cpu" if CPU_DEVICE.installed else "cuda"
                self._measurement = StepMeasurement(device, self._traced)
            try:
                result = original(*arguments, **keywords)
            except SystemExit:
                self._finish()
                raise
            except BaseException:
                # A device that has failed answers no questions; its error is the one to be seen.
                with suppress(Exception):
                    self._finish()
                raise
            self._finish()
            return result

        return train

    def _finish(self) -> None:
        if self._measurement is not None:
            self._measurement.close()
            self._write()
            self._measurement = None

    def _measured(self, original: Callable[..., Any]) -> Callable[..., Any]:
        place = _place_of("forward_backward_func", original)

        @functools.wraps(original)
        def train_step(*arguments: Any, **keywords: Any) -> Any:
            measurement = self._measurement
            if measurement is None:
                return original(*arguments, **keywords)

            def timed(forward_backward: Callable[..., Any]) -> Callable[..., Any]:
                def forward_backward_func(*given: Any, **named: Any) -> Any:
                    result = forward_backward(*given, **named)
                    measurement.between()
                    return result

                return forward_backward_func

            if "forward_backward_func" in keywords:
                keywords["forward_backward_func"] = timed(keywords["forward_backward_func"])
            else:
                arguments = (*arguments[:place], timed(arguments[place]), *arguments[place + 1 :])
            measurement.begin()
            result = original(*arguments, **keywords)
            measurement.end()
            losses = result[0] if isinstance(result, tuple) and result else None
            if losses:
                # Read when the run is over: the device is not waited for.
                self._losses.setdefault(1, losses)
                self._losses[2] = losses
            if measurement.tracing_is_over:
                self._write()
            return result

        return train_step

    def _write(self) -> None:
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size
        from megatron.training import get_args

        args, measurement = get_args(), self._measurement
        assert measurement is not None
        tokens = get_current_global_batch_size() * args.seq_length
        document = measurement.document(shape_of_arguments(args), tokens, args.world_size)
        for word, losses in zip(("first_loss", "last_loss"), self._losses.values(), strict=False):
            document[word] = {name: float(value) for name, value in losses.items()}.get("lm loss")
        try:
            write_document(self._path, document)
        except OSError as error:
            # A full disk costs the profile, and no training.
            _log.warning("--ru-profile %s was not written: %s", self._path, error)


def _place_of(name: str, function: Callable[..., Any]) -> int:
    return list(inspect.signature(function).parameters).index(name)
