"""Gradients that AdamW reads in the dtype in which they were reduced (`--grad-reduce-in-bf16`).

Megatron hands its optimizer fp32 copies of them, since torch wants a gradient in the dtype of its parameter by default:
a pass over all gradients, and 4 bytes for each parameter.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ru.plugin.optimizer_step import MegatronAdamW
from megatron_ru.seams.seam import Seam


def narrow_gradient_seams(args: Any) -> list[Seam]:
    """Seams for a run whose gradient buffers are bf16; none where torch has no gradients of another dtype (2.10)."""
    narrow = getattr(args, "bf16", False) and not getattr(args, "accumulate_allreduce_grads_in_fp32", True)
    if not narrow or not hasattr(torch.Tensor, "grad_dtype"):
        return []
    module = "megatron.core.optimizer"
    method = "_copy_model_grads_to_main_grads"
    return [
        Seam(
            target=f"{module}.{owner}.{method}",
            make=_without_copies,
            expects=("self",),
            reason="Megatron copies bf16 gradients to fp32 for its optimizer",
        )
        for owner in ("distrib_optimizer:DistributedOptimizer", "optimizer:Float16OptimizerWithFloat16Params")
    ]


def _without_copies(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def copy(self: Any) -> None:
        optimizer = getattr(self, "optimizer", None)
        # A scaler divides gradients where they lie, in fp32.
        if not isinstance(optimizer, MegatronAdamW) or getattr(self, "grad_scaler", None) is not None:
            original(self)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad_dtype = None
        with _NothingIsWidened():
            original(self)

    return copy


class _NothingIsWidened(TorchDispatchMode):
    """`.float()` of a bf16 tensor gives the tensor itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        widens = func is torch.ops.aten._to_copy.default and kwargs == {"dtype": torch.float32}
        return args[0] if widens and args[0].dtype is torch.bfloat16 else func(*args, **kwargs)
