"""rms_norm and layer_norm against their float64 formulas."""

import pytest
import torch

from megatron_ru.ops.layer_norm import layer_norm, layer_norm_reference
from megatron_ru.ops.rms_norm import rms_norm, rms_norm_reference


def rms(x, weight, bias, eps, zero_centered=False):
    return rms_norm(x, weight, eps, zero_centered)


def rms_reference(x, weight, bias, eps, zero_centered=False):
    return rms_norm_reference(x, weight, eps, zero_centered)


NORMS = {"rms_norm": (rms, rms_reference), "layer_norm": (layer_norm, layer_norm_reference)}
# The result is rounded to the dtype once after the normalisation and once more after the gain (and the shift): three
# half-ulps at most, beside fp32 arithmetic inside. fp32 sums a row in blocks, which costs a few ulps.
TOLERANCE = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 2, torch.float64: 64}


@pytest.fixture(params=NORMS)
def norm(request):
    return NORMS[request.param]


def sample(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 0.5
    weight = torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_close(found, expected, dtype):
    ulps = TOLERANCE[dtype] * torch.finfo(dtype).eps
    # A shift may cancel the normalised value, whose error stays: hence the absolute part, at values of a few units.
    torch.testing.assert_close(found.double(), expected, rtol=ulps, atol=4 * ulps)


# One row; a row of one; sizes that no vector width divides; more dimensions than Megatron's three; no rows at all.
SHAPES = [(1, 64), (3, 1), (5, 7), (2, 3, 65), (4, 2, 1023), (2, 1, 3, 33), (0, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_formula(norm, shape, dtype, zero_centered):
    op, reference = norm
    x, weight, bias = sample(shape, dtype)
    found = op(x, weight, bias, 1e-5, zero_centered)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert_close(found, reference(x, weight, bias, 1e-5, zero_centered), dtype)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., ::3], lambda x: x[:1].expand(5, -1, -1)],
    ids=["transposed", "every second row", "every third channel", "one row expanded"],
)
def test_strides_do_not_matter(norm, view):
    op, reference = norm
    x = view(sample((4, 6, 33), torch.float32)[0])
    assert not x.is_contiguous()
    _, weight, bias = sample(x.shape, torch.float32, seed=1)
    assert_close(op(x, weight, bias, 1e-5), reference(x, weight, bias, 1e-5), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "size"),
    # Squares of 1e15 stay in fp32; those of 6e4, the largest fp16, would not stay in fp16.
    [(torch.float32, 1e15), (torch.bfloat16, 1e15), (torch.float16, 6e4), (torch.float32, 1e-18),
     (torch.bfloat16, 1e-18), (torch.float16, 1e-4)],
)  # fmt: skip
def test_large_and_tiny_rows(norm, dtype, size):
    op, reference = norm
    x = (sample((3, 129), torch.float64)[0].clamp(-1, 1) * size).to(dtype)
    weight, bias = torch.ones(129, dtype=dtype), torch.zeros(129, dtype=dtype)
    found = op(x, weight, bias, 1e-5)
    assert torch.isfinite(found).all()
    assert_close(found, reference(x, weight, bias, 1e-5), dtype)


def test_rows_of_zeros_and_of_equal_numbers():
    weight, bias = torch.full((5,), 2.0), torch.arange(5.0)
    assert torch.equal(rms_norm(torch.zeros(2, 5), weight, 1e-5), torch.zeros(2, 5))
    assert torch.equal(layer_norm(torch.zeros(2, 5), weight, bias, 1e-5), bias.expand(2, 5))
    # Equal numbers have the root mean square of one of them, and no distance from their mean.
    torch.testing.assert_close(rms_norm(torch.full((2, 5), -7.0), weight, 1e-5), torch.full((2, 5), -2.0))
    torch.testing.assert_close(layer_norm(torch.full((2, 5), -7.0), weight, bias, 1e-5), bias.expand(2, 5))


def test_values_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    # mean of squares 12.5; mean 3.5 and variance 0.25.
    torch.testing.assert_close(rms_norm(x, torch.ones(2), 0.0), x / 12.5**0.5)
    torch.testing.assert_close(layer_norm(x, torch.ones(2), None, 0.0), torch.tensor([[-1.0, 1.0]]))
    # eps is added under the root: 12.5 + 3.5 = 16.
    torch.testing.assert_close(rms_norm(x, torch.ones(2), 3.5), x / 4)
    torch.testing.assert_close(layer_norm(x, torch.ones(2), None, 0.75), torch.tensor([[-0.5, 0.5]]))


def test_one_bad_row_stays_alone(norm):
    op, _ = norm
    x, weight, bias = sample((3, 9), torch.float32)
    clean = op(x, weight, bias, 1e-5)
    x[1, 4] = float("nan")
    found = op(x, weight, bias, 1e-5)
    assert torch.isnan(found[1]).all()
    assert torch.equal(found[::2], clean[::2])


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradients(norm, zero_centered):
    op, _ = norm
    x, weight, bias = (t.requires_grad_() for t in sample((3, 5), torch.float64))
    arguments = (x, weight, bias) if op is layer_norm else (x, weight)
    assert torch.autograd.gradcheck(lambda x, w, b=None: op(x, w, b, 1e-5, zero_centered), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_follow_the_wide_ones(norm, dtype):
    op, reference = norm
    x, weight, bias = sample((6, 65), dtype)
    gradients = []
    for function in (op, reference):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        function(*leaves, bias, 1e-5).double().square().sum().backward()
        gradients.append([leaf.grad.double() for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        # The output, its gradient and the sum over rows are each rounded; the size is that of the largest entry.
        atol = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_weights_in_fp32_serve_inputs_in_bf16(norm):
    op, reference = norm
    x, weight, bias = sample((4, 33), torch.float32)
    found = op(x.bfloat16(), weight, bias, 1e-5)
    assert found.dtype == torch.bfloat16
    expected = reference(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 1e-5)
    assert_close(found, expected, torch.bfloat16)
