"""fp8 products of a linear layer, in plain torch; the kernels are compared in tests/gpu."""

import pytest
import torch

from megatron_ru.ops.fp8 import fits_fp8, linear_fp8, round_fp8

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]


def matrix(*shape, seed=0, size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rounding_reaches_to_the_ends_of_the_format(kind, size):
    x = matrix(32, 48, size=size)
    rounded = round_fp8(x, kind)
    assert rounded.rows.float().abs().max() == torch.finfo(kind).max
    assert torch.equal(rounded.columns.float(), rounded.rows.float().t())
    # A step of the format is at most 2^-3 or 2^-2 of a number, half of which rounding may be off; the smallest numbers
    # of the format are a fixed distance apart.
    bits = torch.finfo(kind).eps / 2
    smallest = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps * rounded.scale
    error = (rounded.rows.float() * rounded.scale - x).abs()
    assert bool((error <= bits * x.abs() + smallest).all())


def test_zeros_stay_zeros_and_a_nan_spreads():
    assert not round_fp8(torch.zeros(16, 16), KINDS[0]).rows.float().any()
    x = torch.ones(16, 16)
    x[3, 4] = float("nan")
    weight = torch.ones(16, 16)
    assert torch.isnan(linear_fp8(x, weight)).all()


def test_products_of_forward_and_backward():
    x, weight = matrix(2, 16, 48).requires_grad_(), matrix(64, 48, seed=1).requires_grad_()
    out = linear_fp8(x, weight)
    upstream = matrix(2, 16, 64, seed=2)
    found = torch.autograd.grad(out, (x, weight), upstream)
    exact = x @ weight.t()
    wanted = torch.autograd.grad(exact, (x, weight), upstream)
    for one, other in zip((out, *found), (exact, *wanted), strict=True):
        assert one.shape == other.shape
        assert ((one - other).norm() / other.norm()).item() < 0.08


def test_the_weights_gradient_is_added_to_the_buffer():
    x, weight, kept = matrix(32, 16), matrix(16, 16, seed=1).requires_grad_(), torch.ones(16, 16)
    upstream = matrix(32, 16, seed=2)
    (alone,) = torch.autograd.grad(linear_fp8(x, weight), weight, upstream)
    torch.autograd.grad(linear_fp8(x, weight, kept), weight, upstream)
    torch.testing.assert_close(kept, alone + 1)


@pytest.mark.parametrize(("tokens", "out", "fits"), [(32, 64, True), (8, 64, False), (32, 40, False), (0, 64, False)])
def test_sizes_are_multiples_of_sixteen(tokens, out, fits):
    assert fits_fp8(torch.empty(tokens, 48), torch.empty(out, 48)) is fits
