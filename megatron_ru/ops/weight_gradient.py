"""The gradient of a linear layer's weight, put by the matrix product itself into the buffer that keeps it."""

import torch
from torch import Tensor

_AWAITS = "_ru_awaits_first"


@torch.no_grad()
def add_weight_gradient(kept: Tensor, gradient: Tensor, input: Tensor) -> None:
    """Adds gradientᵀ · input to `kept`, or writes it there if `kept` awaits its first gradient.

    kept: [out features, in features], fp32 or of the dtype of the others, contiguous; gradient: [tokens, out features];
    input: [tokens, in features]; both of one dtype. On a GPU products of half precision are summed in fp32 and reach
    an fp32 `kept` as they leave the product, so the gradient is never rounded to half precision, nor written twice.
    """
    first = takes_first(kept)
    rows = gradient.t()
    if kept.dtype is gradient.dtype:
        torch.mm(rows, input, out=kept) if first else kept.addmm_(rows, input)
    elif not _sums_in_fp32(kept, gradient):
        kept.copy_(rows @ input) if first else kept.add_(rows @ input)
    elif first:
        torch.mm(rows, input, out_dtype=torch.float32, out=kept)
    else:
        torch.addmm(kept, rows, input, out_dtype=torch.float32, out=kept)


def add_weight_gradient_reference(kept: Tensor, gradient: Tensor, input: Tensor) -> Tensor:
    """What `kept` becomes, in float64, for tests."""
    return kept.double() + gradient.double().t() @ input.double()


def await_first(kept: Tensor) -> None:
    """From now on `kept` counts as zero, whatever it holds, until `takes_first` or `settle` is asked."""
    setattr(kept, _AWAITS, True)


def takes_first(kept: Tensor) -> bool:
    """Whether the caller must write its gradient to `kept` where it would else add it."""
    first = getattr(kept, _AWAITS, False)
    # Also the sign that whoever adds to this tensor asks here.
    setattr(kept, _AWAITS, False)
    return first


def asks_for_first(kept: Tensor) -> bool:
    """Whether somebody has ever asked `takes_first` for `kept`."""
    return hasattr(kept, _AWAITS)


def settle(kept: Tensor) -> None:
    """Makes `kept` zero if it still awaits its first gradient: it is about to be read, or added to by others."""
    if getattr(kept, _AWAITS, False):
        kept.zero_()
        setattr(kept, _AWAITS, False)


def _sums_in_fp32(kept: Tensor, gradient: Tensor) -> bool:
    half = gradient.dtype in (torch.bfloat16, torch.float16)
    return kept.is_cuda and half and kept.dtype is torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out")
