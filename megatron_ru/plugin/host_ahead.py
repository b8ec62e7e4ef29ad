"""A host that runs ahead of the device: Megatron's loop without the places where each step waits for it.

Between two steps Megatron asks the device for numbers that the host knows, or that nobody needs yet: whether one rank
agrees with itself, a learning rate, a loss scale of one, the norm of the gradients. Each question lets the queue run
dry; on an H200 with a step of 180 ms that was 9 ms.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_ru.seams.seam import Seam
from megatron_ru.seams.stand_in import stand_in

_TRAINING = "megatron.training.training"


def host_ahead_seams() -> list[Seam]:
    """Seams on Megatron's training loop; numbers that are needed on the host, as for a log, are fetched as before."""
    scale = "the loss scale is fetched from the device in each step, also where it is one"
    return [
        Seam(
            target=f"{_TRAINING}:logical_and_across_model_parallel_group",
            make=_alone(bool),
            optional=True,
            reason="a rank without others agrees with itself",
        ),
        Seam(
            target=f"{_TRAINING}:reduce_max_stat_across_model_parallel_group",
            make=_alone(_as_scalar),
            optional=True,
            reason="a rank without others has the largest number",
        ),
        Seam(
            target=f"{_TRAINING}:torch",
            make=_torch_that_fills,
            reason="a number that is copied to the device makes the host wait for the device",
        ),
        Seam(
            target="megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.get_loss_scale", make=_known, reason=scale
        ),
        Seam(target="megatron.core.optimizer.optimizer:FP32Optimizer.get_loss_scale", make=_known, reason=scale),
        # With this function Megatron leaves the norm of the gradients on the device.
        Seam(
            target="megatron.core.optimizer.clip_grads:multi_tensor_scale_tensor_impl",
            make=lambda found: found or _scale,
            optional=True,
            reason="the norm of the gradients is fetched from the device before the step",
        ),
    ]


def _alone(answer: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A reduction that gives `answer(value)` where the model-parallel group is one rank, and asks the others else."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def reduce(value: Any, group: Any = None, **keywords: Any) -> Any:
            asked = group
            if asked is None:
                from megatron.core.parallel_state import get_model_parallel_group

                asked = get_model_parallel_group()
            if asked.size() == 1 and not keywords:
                return answer(value)
            # Before 0.19 there is no group to be told.
            return original(value, **({} if group is None else {"group": group}), **keywords)

        return reduce

    return make


def _as_scalar(value: Any) -> Any:
    return value.reshape(()) if isinstance(value, Tensor) else value


def _torch_that_fills(original: ModuleType) -> ModuleType:
    """`torch` as Megatron's loop sees it: a tensor of one known number is filled on the device, not copied there."""
    seen = stand_in(original)

    @functools.wraps(original.tensor)
    def tensor(data: Any, *arguments: Any, **keywords: Any) -> Tensor:
        one_number = isinstance(data, list) and len(data) == 1 and isinstance(data[0], (int, float))
        if one_number and not arguments and keywords.get("device") is not None and keywords.get("dtype") is not None:
            return torch.full((1,), data[0], **keywords)
        return original.tensor(data, *arguments, **keywords)  # type: ignore[no-any-return]

    seen.tensor = tensor  # type: ignore[attr-defined]
    return seen


class _One(Tensor):
    """A loss scale of one: what it is multiplied with is a plain tensor, and its value is known."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def item(self) -> float:
        """1.0."""
        return 1.0


def _known(original: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def get_loss_scale(self: Any) -> Tensor:
        if getattr(self, "grad_scaler", None) is not None:
            return original(self)
        known = self.__dict__.get("_megatron_ru_scale")
        if known is None:
            known = torch.Tensor._make_subclass(_One, original(self).detach())
            self.__dict__["_megatron_ru_scale"] = known
        return known  # type: ignore[no-any-return]

    return get_loss_scale


def _scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Any, factor: Tensor) -> None:
    sources, targets = tensor_lists
    if sources is not targets:
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor.reshape(()))
