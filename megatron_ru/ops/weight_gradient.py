"""The gradient of a linear layer's weight, added by the matrix product itself to the buffer that keeps it."""

import torch
from torch import Tensor


@torch.no_grad()
def add_weight_gradient(kept: Tensor, gradient: Tensor, input: Tensor) -> None:
    """Adds gradientᵀ · input to `kept`.

    kept: [out features, in features], fp32 or of the dtype of the others, contiguous; gradient: [tokens, out features];
    input: [tokens, in features]; both of one dtype. On a GPU products of half precision are summed in fp32 and added
    to an fp32 `kept` as they leave the product, so the gradient is never rounded to half precision, nor written twice.
    """
    if kept.dtype is gradient.dtype:
        kept.addmm_(gradient.t(), input)
    elif _sums_in_fp32(kept, gradient):
        torch.addmm(kept, gradient.t(), input, out_dtype=torch.float32, out=kept)
    else:
        kept.add_(gradient.t() @ input)


def add_weight_gradient_reference(kept: Tensor, gradient: Tensor, input: Tensor) -> Tensor:
    """What `kept` becomes, in float64, for tests."""
    return kept.double() + gradient.double().t() @ input.double()


def _sums_in_fp32(kept: Tensor, gradient: Tensor) -> bool:
    half = gradient.dtype in (torch.bfloat16, torch.float16)
    return kept.is_cuda and half and kept.dtype is torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out")
