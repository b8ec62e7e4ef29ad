"""Megatron's buffer for a weight's gradient, for layers whose backward adds to it by themselves."""

import torch
from torch import Tensor


def gradient_buffer_of(weight: Tensor) -> Tensor | None:
    """The buffer to add to, fp32 or of the weight's dtype, or None where Megatron must be handed the gradient: nothing
    is recorded, there is no such buffer, or the output layer shares the weight and Megatron adds what is returned."""
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    records = torch.is_grad_enabled() and weight.requires_grad
    marked = hasattr(weight, "grad_added_to_main_grad") and not getattr(weight, "zero_out_wgrad", False)
    return buffer if records and marked else None


def mark_when_added(output: Tensor, weight: Tensor) -> None:
    """Once `output` has its gradient, Megatron's hook takes what backward returns for the weight for empty."""
    output.register_hook(lambda _: setattr(weight, "grad_added_to_main_grad", True))
