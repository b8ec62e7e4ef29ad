"""A weight's gradient added to the buffer that keeps it."""

import pytest
import torch

from megatron_ru.ops.weight_gradient import (
    add_weight_gradient,
    add_weight_gradient_reference,
    asks_for_first,
    await_first,
    settle,
    takes_first,
)

DTYPES = pytest.mark.parametrize(
    ("kept_type", "dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.float32, torch.bfloat16, 3e-2),
    ],
)


@DTYPES
def test_adds_to_what_is_kept(kept_type, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(7, 5, generator=generator).to(kept_type)
    gradient, given = (torch.randn(33, size, generator=generator).to(dtype) for size in (7, 5))
    exact = add_weight_gradient_reference(kept, gradient, given)
    add_weight_gradient(kept, gradient, given)
    add_weight_gradient(kept, torch.zeros_like(gradient), given)
    torch.testing.assert_close(kept.double(), exact, rtol=tolerance, atol=tolerance * 10)
    assert kept.dtype is kept_type


@DTYPES
def test_writes_the_first(kept_type, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    kept = torch.full((7, 5), torch.nan, dtype=kept_type)
    gradient, given = (torch.randn(33, size, generator=generator).to(dtype) for size in (7, 5))
    await_first(kept)
    exact = add_weight_gradient_reference(torch.zeros_like(kept), gradient, given)
    for times in (1, 2):
        add_weight_gradient(kept, gradient, given)
        torch.testing.assert_close(kept.double(), times * exact, rtol=tolerance, atol=tolerance * 10)


def test_a_tensor_awaits_until_it_is_asked():
    kept = torch.ones(2)
    assert not asks_for_first(kept)
    settle(kept)
    assert kept.tolist() == [1.0, 1.0]
    await_first(kept)
    assert takes_first(kept)
    assert not takes_first(kept)
    assert asks_for_first(kept)
    await_first(kept)
    settle(kept)
    assert kept.tolist() == [0.0, 0.0]
    assert not takes_first(kept)
