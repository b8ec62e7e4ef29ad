"""Layer normalisation."""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False) -> Tensor:
    """`weight · (x - mean) / sqrt(var + eps) + bias` over the last dimension, in the dtype of `x`.

    x: [..., hidden]; weight and bias: [hidden]. Moments are taken in fp32 at least.
    Source: Ba, Kiros and Hinton, 2016, "Layer Normalization", equation 4.
    """
    gain = weight + 1 if zero_centered else weight
    shift = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), gain.to(x.dtype), shift, eps)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """The same by the formula, in float64, for tests."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    gain = weight.double() + (1 if zero_centered else 0)
    normal = gain * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normal if bias is None else normal + bias.double()
