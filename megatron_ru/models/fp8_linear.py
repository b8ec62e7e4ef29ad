"""Megatron's parallel linears with fp8 products."""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ru.models.gradient_buffer import gradient_buffer_of, mark_when_added
from megatron_ru.ops.fp8 import fits_fp8, linear_fp8


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's, but for the products."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        found = _multiply(input, weight, keywords)
        return super()._forward_impl(input, weight, *arguments, **keywords) if found is None else found


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's, but for the products."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        found = _multiply(input, weight, keywords)
        return super()._forward_impl(input, weight, *arguments, **keywords) if found is None else found


def _multiply(input: Tensor, weight: Tensor, keywords: dict[str, Any]) -> Tensor | None:
    """input · weightᵀ, plus the bias; None where a size does not fit, or the weight's gradient is to wait."""
    if keywords.get("grad_output_buffer") is not None or not fits_fp8(input, weight):
        return None
    group = keywords.get("tp_group")
    if keywords.get("sequence_parallel"):
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
    elif keywords.get("allreduce_dgrad"):
        input = copy_to_tensor_model_parallel_region(input, group=group)
    kept = gradient_buffer_of(weight) if keywords.get("gradient_accumulation_fusion") else None
    output = linear_fp8(input, weight, kept)
    if kept is not None:
        mark_when_added(output, weight)
    bias = keywords.get("bias")
    return output if bias is None else output + bias
