"""Layer normalisation, alone and with a residual added first."""

import torch
from torch import Tensor

from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.norm_samples import GRADIENT_TOLERANCE, PLAIN_TOLERANCE, SUM_TOLERANCE, TOLERANCE, cases, samples
from megatron_ru.ops.op import Op, register

SWITCH = switch("layer_norm")
_fused = operator("layer_norm")
_fused_add = operator("add_layer_norm")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False) -> Tensor:
    """`weight · (x - mean) / sqrt(var + eps) + bias` over the last dimension, in the dtype of `x`.

    x: [..., hidden] in fp32, bf16, fp16 or fp64; weight and bias: [hidden], both in the dtype of x or both fp32.
    Inside, numbers are fp32 (fp64 beside fp64); the result is rounded once.
    With `zero_centered` the stored weight is the distance from one, so that weight decay pulls towards one.
    Source: Ba, Kiros and Hinton, 2016, "Layer Normalization", equation 4.
    """
    if SWITCH.takes(x) and _parameters_fit(x, weight, bias):
        return _fused(x, weight, bias, eps, zero_centered)
    SWITCH.fell_back(x, "weight and bias are neither fp32 nor of the input's dtype" if SWITCH.takes(x) else None)
    return layer_norm_plain(x, weight, bias, eps, zero_centered)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm, sum): sum = x + residual, rounded to their dtype, and the `layer_norm` of it.

    x and residual: [..., hidden] of one shape and dtype; weight and bias: [hidden].
    """
    if SWITCH.takes(x) and _parameters_fit(x, weight, bias) and residual.dtype is x.dtype:
        return _fused_add(x, residual, weight, bias, eps, zero_centered)
    SWITCH.fell_back(x, "x, residual, weight and bias differ in dtype" if SWITCH.takes(x) else None)
    return add_layer_norm_plain(x, residual, weight, bias, eps, zero_centered)


def layer_norm_plain(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False) -> Tensor:
    """The same in plain torch."""
    shape = (x.shape[-1],)
    if weight.dtype == x.dtype and not zero_centered and (bias is None or bias.dtype == x.dtype):
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
    # One added to a small half-precision weight, or an fp32 weight cut to half precision, would lose what was learnt.
    wide = torch.promote_types(x.dtype, torch.float32)
    gain = weight.to(wide) + 1 if zero_centered else weight.to(wide)
    shift = None if bias is None else bias.to(wide)
    return torch.nn.functional.layer_norm(x.to(wide), shape, gain, shift, eps).to(x.dtype)


def add_layer_norm_plain(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + residual
    return layer_norm_plain(total, weight, bias, eps, zero_centered), total


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """The same by the formula, in float64, for tests."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    gain = weight.double() + (1 if zero_centered else 0)
    normal = gain * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normal if bias is None else normal + bias.double()


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """The same by the formula, in float64, for tests."""
    total = x.double() + residual.double()
    return layer_norm_reference(total, weight, bias, eps, zero_centered), total


def _parameters_fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtype = weight.dtype
    fits = dtype is x.dtype or (dtype is torch.float32 and x.dtype is not torch.float64)
    return fits and (bias is None or bias.dtype is dtype)


register(
    Op(
        name="layer_norm",
        switch="layer_norm",
        summary="LayerNorm",
        function=layer_norm,
        plain=layer_norm_plain,
        reference=layer_norm_reference,
        samples=samples(residual=False, bias=True),
        cases=cases(residual=False, bias=True),
        tolerance=TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        plain_tolerance=PLAIN_TOLERANCE,
        torch_ops=("layer_norm",),
    )
)
register(
    Op(
        name="add_layer_norm",
        switch="layer_norm",
        summary="residual sum and LayerNorm of it",
        function=add_layer_norm,
        plain=add_layer_norm_plain,
        reference=add_layer_norm_reference,
        samples=samples(residual=True, bias=True),
        cases=cases(residual=True, bias=True),
        tolerance=SUM_TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        plain_tolerance=PLAIN_TOLERANCE,
        torch_ops=("add_layer_norm",),
    )
)
