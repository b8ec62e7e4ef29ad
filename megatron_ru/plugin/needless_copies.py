"""Copies that a load makes of what already lies where it belongs.

Megatron loads each tensor into the weight itself. Gate and up projection are loaded as two views of theirs, put
together in new memory, and copied back; then every weight is copied onto itself. On a CPU that is more than the
reading, on a GPU memory for all gates at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NeedlessCopies(TorchFunctionMode):
    """While entered, a tensor that is copied onto itself stays, and the parts of one matrix are put together as the
    view that they are of it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and len(args) >= 2 and _same(args[0], args[1]):
            return args[0]
        if func is torch.cat and args and not kwargs and (joined := _joined(args)) is not None:
            return joined
        return func(*args, **(kwargs or {}))


def _same(target: Any, source: Any) -> bool:
    """Whether both are the same numbers in the same memory."""
    return (
        isinstance(source, Tensor)
        and target.device == source.device
        and not target.is_meta
        and target.dtype is source.dtype
        and target.shape == source.shape
        and target.stride() == source.stride()
        and target.data_ptr() == source.data_ptr()
        and target.data_ptr() != 0
    )


def _joined(args: tuple[Any, ...]) -> Tensor | None:
    """What `torch.cat` of matrices along the first dimension would copy, as a view; None where they do not follow each
    other in one memory."""
    parts: Sequence[Any] = args[0] if isinstance(args[0], (list, tuple)) else ()
    if len(parts) < 2 or args[1:] not in ((), (0,)):
        return None
    first = parts[0]
    if not isinstance(first, Tensor) or first.dim() < 2 or first.is_meta or first.requires_grad:
        return None
    place, rows = first.data_ptr(), 0
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        fits = (
            type(part) is type(first)
            and part.dtype is first.dtype
            and part.shape[1:] == first.shape[1:]
            and part.is_contiguous()
            and part.data_ptr() == place
            and part.untyped_storage().data_ptr() == storage
        )
        if not fits or not part.numel():
            return None
        place += part.numel() * part.element_size()
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())
