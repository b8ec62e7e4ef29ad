"""Root mean square normalisation, alone and with a residual added first."""

import torch
from torch import Tensor

from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.norm_samples import GRADIENT_TOLERANCE, PLAIN_TOLERANCE, SUM_TOLERANCE, TOLERANCE, cases, samples
from megatron_ru.ops.op import Op, register

SWITCH = switch("rms_norm")
_fused = operator("rms_norm")
_fused_add = operator("add_rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension, in the dtype of `x`.

    x: [..., hidden] in fp32, bf16, fp16 or fp64; weight: [hidden] in the dtype of x or fp32. Inside, numbers are fp32
    (fp64 beside fp64); the result is rounded once.
    With `zero_centered` the stored weight is the distance from one, so that weight decay pulls towards one.
    Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    if SWITCH.takes(x) and _fits(x.dtype, weight.dtype):
        return _fused(x, weight, eps, zero_centered)
    SWITCH.fell_back(x, "the weight is neither fp32 nor of the input's dtype" if SWITCH.takes(x) else None)
    return rms_norm_plain(x, weight, eps, zero_centered)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm, sum): sum = x + residual, rounded to their dtype, and the `rms_norm` of it.

    x and residual: [..., hidden] of one shape and dtype; weight: [hidden].
    """
    if SWITCH.takes(x) and _fits(x.dtype, weight.dtype) and residual.dtype is x.dtype:
        return _fused_add(x, residual, weight, eps, zero_centered)
    SWITCH.fell_back(x, "x, residual and weight differ in dtype" if SWITCH.takes(x) else None)
    return add_rms_norm_plain(x, residual, weight, eps, zero_centered)


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """The same in plain torch."""
    shape = (x.shape[-1],)
    if weight.dtype == x.dtype and not zero_centered:
        return torch.nn.functional.rms_norm(x, shape, weight, eps)
    # One added to a small half-precision weight, or an fp32 weight cut to half precision, would lose what was learnt.
    wide = torch.promote_types(x.dtype, torch.float32)
    gain = weight.to(wide) + 1 if zero_centered else weight.to(wide)
    return torch.nn.functional.rms_norm(x.to(wide), shape, gain, eps).to(x.dtype)


def add_rms_norm_plain(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + residual
    return rms_norm_plain(total, weight, eps, zero_centered), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """The same by the formula, in float64, for tests."""
    wide = x.double()
    gain = weight.double() + (1 if zero_centered else 0)
    return gain * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """The same by the formula, in float64, for tests."""
    total = x.double() + residual.double()
    return rms_norm_reference(total, weight, eps, zero_centered), total


def _fits(dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    return weight_dtype is dtype or (weight_dtype is torch.float32 and dtype is not torch.float64)


register(
    Op(
        name="rms_norm",
        switch="rms_norm",
        summary="RMSNorm",
        function=rms_norm,
        plain=rms_norm_plain,
        reference=rms_norm_reference,
        samples=samples(residual=False, bias=False),
        cases=cases(residual=False, bias=False),
        tolerance=TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        plain_tolerance=PLAIN_TOLERANCE,
        torch_ops=("rms_norm",),
    )
)
register(
    Op(
        name="add_rms_norm",
        switch="rms_norm",
        summary="residual sum and RMSNorm of it",
        function=add_rms_norm,
        plain=add_rms_norm_plain,
        reference=add_rms_norm_reference,
        samples=samples(residual=True, bias=False),
        cases=cases(residual=True, bias=False),
        tolerance=SUM_TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        plain_tolerance=PLAIN_TOLERANCE,
        torch_ops=("add_rms_norm",),
    )
)
