"""Root mean square normalisation."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension, in the dtype of `x`.

    x: [..., hidden] in fp32, bf16, fp16 or fp64; weight: [hidden]. The mean is taken in fp32 at least.
    With `zero_centered` the stored weight is the distance from one, so that weight decay pulls towards one.
    Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    gain = weight + 1 if zero_centered else weight
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """The same by the formula, in float64, for tests."""
    wide = x.double()
    gain = weight.double() + (1 if zero_centered else 0)
    return gain * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
