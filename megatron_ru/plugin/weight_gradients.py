"""Weight gradients that go straight into Megatron's gradient buffer, without Apex.

Megatron's linears do so with `gradient_accumulation_fusion`, through two functions of Apex's module
fused_weight_gradient_mlp_cuda. Otherwise a gradient is written in the parameters' dtype, read again, and added to the
buffer: on an H200 a twentieth of a step.
"""

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_ru.models.gradient_buffer import gradient_buffer_of, mark_when_added
from megatron_ru.ops.embedding import SWITCH as EMBEDDING
from megatron_ru.ops.embedding import embedding
from megatron_ru.ops.weight_gradient import add_weight_gradient, settle
from megatron_ru.seams.seam import Seam
from megatron_ru.seams.stand_in import stand_in


def weight_gradient_seams() -> list[Seam]:
    """Seams for a run with `gradient_accumulation_fusion`: the functions of Apex's module where Apex is not installed,
    and an embedding that does likewise."""
    reason = "Megatron asks Apex for the product that adds to the gradient buffer"
    layers = "megatron.core.tensor_parallel.layers"
    return [
        Seam(
            target=f"{layers}:F",
            make=_with_our_embedding,
            reason="the gradient of an embedding is a matrix of all rows, added to the buffer as a whole",
        ),
        Seam(target=f"{layers}:_grad_accum_fusion_available", make=lambda _: True, reason=reason),
        Seam(target=f"{layers}:fused_weight_gradient_mlp_cuda", make=_functions, creates=True, reason=reason),
        # With --defer-embedding-wgrad-compute the output layer's gradient is computed from there.
        Seam(target="megatron.core.utils:fused_weight_gradient_mlp_cuda", make=_functions, creates=True, reason=reason),
    ]


def _functions(apex: Any) -> Any:
    names = ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16")
    return SimpleNamespace(**{name: _accumulate if apex is None else _settled(getattr(apex, name)) for name in names})


def _settled(add: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Apex adds without asking, also where a product in fp8 has asked in the step before."""

    @functools.wraps(add)
    def add_to(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        settle(main_grad)
        add(total_input, grad_output, main_grad)

    return add_to


def _accumulate(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    add_weight_gradient(main_grad, grad_output.flatten(0, -2), total_input.flatten(0, -2))


def _with_our_embedding(original: ModuleType) -> ModuleType:
    """torch.nn.functional as Megatron's parallel layers see it."""
    seen = stand_in(original)
    seen.embedding = _embedding(original.embedding)  # type: ignore[attr-defined]
    return seen


def _embedding(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def look_up(input: Tensor, weight: Tensor, *others: Any, **keywords: Any) -> Tensor:
        kept = gradient_buffer_of(weight) if EMBEDDING.on else None
        if others or keywords or kept is None or kept.dtype is not torch.float32:
            return original(input, weight, *others, **keywords)
        out = embedding(input, weight, kept)
        mark_when_added(out, weight)
        return out

    return look_up
