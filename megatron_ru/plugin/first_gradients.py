"""Gradients that are written where they would be added to zeros.

Megatron makes its gradient buffer zero before each step, and each weight's product reads the zeros again to add to
them: 8 bytes a parameter for nothing. A weight whose product asks whether it is the first of a step
(`megatron_ru.ops.weight_gradient`) needs no zeros.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ru.ops.weight_gradient import asks_for_first, await_first, settle
from megatron_ru.seams.seam import Seam

_REASON = "Megatron zeroes the gradient buffer as a whole before each step"
# A graph that was captured does the same in each micro-batch, the first or not.
_GRAPHS = ("enable_cuda_graph", "external_cuda_graph")


def first_gradient_seams(args: Any) -> list[Seam]:
    """Seams on the zeroing of gradient buffers, on what autograd adds to them, and on their reduction, around all that
    reads them before it."""
    if getattr(args, "cuda_graph_impl", None) not in (None, "none") or any(
        getattr(args, flag, False) for flag in _GRAPHS
    ):
        return []
    module = "megatron.core.distributed.param_and_grad_buffer"
    model = "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel"
    return [
        Seam(target=f"{module}:_ParamAndGradBuffer.reset", make=_zero_the_rest, expects=("self",), reason=_REASON),
        Seam(
            target=f"{module}:_ParamAndGradBucketGroup.start_grad_sync",
            make=_settle_before,
            expects=("self",),
            reason=_REASON,
        ),
        Seam(
            target=f"{model}._make_backward_post_hook",
            make=_settle_before_autograd,
            expects=("self", "param"),
            reason=_REASON,
        ),
    ]


def _zero_the_rest(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def reset(self: Any) -> None:
        asking = [parameter for parameter in self.params if _can_wait(parameter)]
        if not asking:
            original(self)
            return
        ranges = sorted(self.param_index_map[parameter][:2] for parameter in asking)
        # Nothing is left in a buffer of experts alone.
        if rest := [*_between(self.grad_data, ranges), *getattr(self, "extra_main_grads", ())]:
            torch._foreach_zero_(rest)
        for parameter in asking:
            await_first(parameter.main_grad)

    return reset


def _can_wait(parameter: Any) -> bool:
    """Whether products alone write to the parameter's gradient, and ask. Else an embedding's rows are added too, or the
    gradient lies apart from the buffer."""
    shared = getattr(parameter, "shared_embedding", False) or getattr(parameter, "zero_out_wgrad", False)
    apart = getattr(parameter, "main_grad_copy_in_grad_buffer", None) is not None
    return not shared and not apart and asks_for_first(parameter.main_grad)


def _between(data: Tensor, ranges: list[tuple[int, int]]) -> list[Tensor]:
    starts = [0, *(end for _, end in ranges)]
    ends = [*(start for start, _ in ranges), data.numel()]
    return [data[start:end] for start, end in zip(starts, ends, strict=True) if start < end]


def _settle_before(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start_grad_sync(self: Any, *arguments: Any, **keywords: Any) -> Any:
        for bucket in self.buckets:
            for parameter in bucket.params_list:
                settle(parameter.main_grad)
        return original(self, *arguments, **keywords)

    return start_grad_sync


def _settle_before_autograd(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_hook(self: Any, param: Any, *arguments: Any, **keywords: Any) -> Any:
        hook = original(self, param, *arguments, **keywords)

        @functools.wraps(hook)
        def settle_then_add(*gradients: Any) -> Any:
            # Its product asked in a step before, and this one's gradient comes another way.
            if not getattr(param, "grad_added_to_main_grad", True):
                settle(param.main_grad)
            return hook(*gradients)

        return settle_then_add

    return make_hook
