"""A linear layer whose three matrix products are of fp8 numbers, each operand with one scale of its own.

Weights and inputs are e4m3, gradients e5m2; the scale of a tensor is taken from the tensor itself, and products are
summed in fp32. Source: Micikevicius et al., 2022, "FP8 Formats for Deep Learning", sections 3 and 4.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ru.ops.cublaslt import library, put_fp8_product
from megatron_ru.ops.library import load, operator
from megatron_ru.ops.weight_gradient import takes_first

_fused_round = operator("round_fp8")

MULTIPLE = 16
"""Of which every size of an fp8 product must be a multiple."""


class Rounded(NamedTuple):
    """A matrix in fp8, twice, and what its numbers are to be multiplied by."""

    rows: Tensor
    """[rows, columns], contiguous."""
    columns: Tensor
    """[columns, rows], contiguous."""
    scale: Tensor
    """fp32 scalar."""


def round_fp8(x: Tensor, dtype: torch.dtype) -> Rounded:
    """x [rows, columns] in `dtype`, torch.float8_e4m3fn or torch.float8_e5m2, its largest magnitude at the format's
    largest number. Sizes are multiples of 16. A NaN or an infinity makes every product NaN."""
    if x.is_cuda and load().cuda:
        return Rounded(*_fused_round(x, dtype is torch.float8_e5m2))
    return round_fp8_plain(x, dtype)


def round_fp8_plain(x: Tensor, dtype: torch.dtype) -> Rounded:
    """The same in plain torch."""
    limit = torch.finfo(dtype).max
    largest = x.abs().amax().float()
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / limit)
    rows = (x.float() / scale).clamp(-limit, limit).to(dtype)
    return Rounded(rows, rows.t().contiguous(), scale)


def linear_fp8(x: Tensor, weight: Tensor, kept: Tensor | None = None) -> Tensor:
    """x · weightᵀ in the dtype of x: [..., out features] of x [..., in features], weight [out features, in features].

    With `kept`, of the weight's shape and in fp32 or its dtype, backward adds the weight's gradient there, or writes it
    if `kept` awaits its first (`megatron_ru.ops.weight_gradient`), and returns an empty one.
    """
    return _LinearFp8.apply(x, weight, kept)  # type: ignore[no-any-return]


def fits_fp8(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_fp8` takes these: every size a multiple of 16."""
    tokens = x.numel() // x.shape[-1]
    return not any(size % MULTIPLE for size in (tokens, *weight.shape)) and tokens > 0


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor | None) -> Tensor:
        inputs = round_fp8(x.reshape(-1, x.shape[-1]), torch.float8_e4m3fn)
        weights = round_fp8(weight, torch.float8_e4m3fn)
        # What backward multiplies is transposed, and half the size of what went in.
        ctx.save_for_backward(inputs.columns, inputs.scale, weights.columns, weights.scale, weight)
        # Not saved: other micro-batches write to the buffer before this one's turn comes, as they should.
        ctx.kept = kept
        out = _product(inputs.rows, weights.rows, inputs.scale, weights.scale, x.dtype, fast=True)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, input_scale, weights, weight_scale, weight = ctx.saved_tensors
        rounded = round_fp8(gradient.reshape(-1, gradient.shape[-1]), torch.float8_e5m2)
        back = _product(rounded.rows, weights, rounded.scale, weight_scale, gradient.dtype, fast=False)
        back = back.view(*gradient.shape[:-1], -1)
        if ctx.kept is None:
            own = _product(rounded.columns, inputs, rounded.scale, input_scale, weight.dtype, fast=False)
            return back, own, None
        first = takes_first(ctx.kept)
        wide = ctx.kept.dtype is torch.float32
        if wide and rounded.columns.is_cuda and library() is not None:
            put_fp8_product(ctx.kept, rounded.columns, inputs, rounded.scale, input_scale, add=not first)
        else:
            own = _product(rounded.columns, inputs, rounded.scale, input_scale, ctx.kept.dtype, fast=False)
            ctx.kept.copy_(own) if first else ctx.kept.add_(own)
        return back, torch.empty_like(weight), None


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """scale_a · scale_b · (a [rows, depth] · b [columns, depth]ᵀ); `fast` keeps sums in the multiplier, whose additions
    are of fewer bits."""
    if a.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() @ b.float().t()) * (scale_a * scale_b)).to(dtype)
