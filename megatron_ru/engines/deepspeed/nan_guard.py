"""`--ru-nan-grads` before each of DeepSpeed's reductions: the guard of the Megatron engine, at other places.

ZeRO 2 and 3 reduce every micro-batch by itself, and a NaN costs the tensor in that micro-batch. ZeRO 0 and 1 reduce the
sum of all of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megatron_ru.plugin.nan_gradients import current_nan_gradients, reduction
from megatron_ru.seams.seam import Seam

_REASON = "DeepSpeed spreads a NaN to all ranks, and has no door between a gradient and its reduction"
_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"


def nan_guard_seams() -> list[Seam]:
    """The seams on the three ways in which DeepSpeed reduces gradients."""
    return [
        Seam(
            target="deepspeed.runtime.engine:DeepSpeedEngine.buffered_allreduce_fallback",
            make=_of_whole_gradients,
            expects=("self", "grads"),
            reason=_REASON,
        ),
        Seam(
            target="deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.reduce_ipg_grads",
            make=_of_a_bucket,
            expects=("self", "comm_dtype"),
            reason=_REASON,
        ),
        Seam(
            target=f"deepspeed.runtime.zero.stage3:{_STAGE_3}._{_STAGE_3}__reduce_and_partition_ipg_grads",
            make=_of_a_bucket_of_shards,
            expects=("self", "communication_data_type"),
            reason=_REASON,
        ),
    ]


def _of_whole_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """ZeRO 0, and ZeRO 1 over bf16 with sums in fp32."""

    @functools.wraps(original)
    def buffered_allreduce_fallback(self: Any, grads: Any = None, **keywords: Any) -> Any:
        optimizer = self.optimizer
        if hasattr(optimizer, "fp32_groups_gradients"):
            parameters = [parameter for group in optimizer.bf16_groups for parameter in group]
            gradients = [gradient for group in optimizer.fp32_groups_gradients for gradient in group]
        else:
            parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
        _guard(parameters, gradients, self.seq_data_parallel_group)
        return original(self, grads, **keywords)

    return buffered_allreduce_fallback


def _of_a_bucket(original: Callable[..., Any]) -> Callable[..., Any]:
    """ZeRO 1 and 2."""

    @functools.wraps(original)
    def reduce_ipg_grads(self: Any, comm_dtype: Any = None) -> Any:
        for dtype, bucket in self.ipg_buckets.items():
            if comm_dtype in (None, dtype):
                parameters = [self.bit16_groups[group][place] for group, place, _ in bucket.params]
                _guard(parameters, bucket.grads, self.dp_process_group)
        return original(self, comm_dtype)

    return reduce_ipg_grads


def _of_a_bucket_of_shards(original: Callable[..., Any]) -> Callable[..., Any]:
    """ZeRO 3."""

    @functools.wraps(original)
    def reduce_and_partition(self: Any, communication_data_type: Any) -> Any:
        from deepspeed.accelerator import get_accelerator

        parameters = list(self.ipg_buckets[communication_data_type].params)
        # The gradients were copied in that stream.
        with get_accelerator().stream(self.reduce_and_partition_stream):
            _guard(parameters, [parameter.grad for parameter in parameters], self.dp_process_group)
        return original(self, communication_data_type)

    return reduce_and_partition


def _guard(parameters: Sequence[Any], gradients: Sequence[Tensor], group: Any) -> None:
    guard = current_nan_gradients()
    if guard is not None and gradients:
        guard.before_reduction(reduction(list(parameters), list(gradients), [group]))
