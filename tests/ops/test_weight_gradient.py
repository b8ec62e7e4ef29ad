"""A weight's gradient added to the buffer that keeps it."""

import pytest
import torch

from megatron_ru.ops.weight_gradient import add_weight_gradient, add_weight_gradient_reference


@pytest.mark.parametrize(
    ("kept_type", "dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.float32, torch.bfloat16, 3e-2),
    ],
)
def test_adds_to_what_is_kept(kept_type, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(7, 5, generator=generator).to(kept_type)
    gradient, given = (torch.randn(33, size, generator=generator).to(dtype) for size in (7, 5))
    exact = add_weight_gradient_reference(kept, gradient, given)
    add_weight_gradient(kept, gradient, given)
    add_weight_gradient(kept, torch.zeros_like(gradient), given)
    torch.testing.assert_close(kept.double(), exact, rtol=tolerance, atol=tolerance * 10)
    assert kept.dtype is kept_type
