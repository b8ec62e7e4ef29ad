"""fp8 products on a GPU: the rounding kernel, the products, and the one that adds."""

import pytest
import torch

from megatron_ru.ops.cublaslt import library, put_fp8_product
from megatron_ru.ops.fp8 import linear_fp8, round_fp8, round_fp8_plain

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fp8_products():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no fp8 products")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(16, 16), (272, 144), (16, 4112), (1024, 656)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_that_of_torch(kind, shape, dtype):
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).mul(3).to(dtype)
    found, expected = round_fp8(x, kind), round_fp8_plain(x, kind)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
    assert torch.equal(found.rows.float().t(), found.columns.float())
    # A quotient may lie on the other side of a tie when the scale differs in its last bit.
    differ = found.rows.float() != expected.rows.float()
    assert differ.float().mean().item() < 1e-4
    step = expected.rows.float().abs() * torch.finfo(kind).eps + torch.finfo(kind).smallest_normal
    assert bool(((found.rows.float() - expected.rows.float()).abs() <= step).all())


def test_a_nan_and_zeros():
    assert not round_fp8(torch.zeros(32, 32, device="cuda"), torch.float8_e4m3fn).rows.float().any()
    x = torch.ones(32, 64, device="cuda", dtype=torch.bfloat16)
    x[31, 63] = float("inf")
    weight = torch.ones(16, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.isnan(linear_fp8(x, weight)).all()


def test_the_product_that_writes_and_adds():
    assert library() is not None
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((272, 4096), (144, 4096)))
    left, right = round_fp8(a, torch.float8_e5m2), round_fp8(b, torch.float8_e4m3fn)
    exact = (left.rows.double() @ right.rows.double().t()) * left.scale.double() * right.scale.double()
    kept = torch.full((272, 144), torch.nan, device="cuda")
    for times in (1, 2, 3):
        put_fp8_product(kept, left.rows, right.rows, left.scale, right.scale, add=times > 1)
        error = (kept.double() - times * exact).abs().max() / exact.abs().max()
        assert error.item() < 2e-3


def test_a_linear_layer_forward_and_backward():
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(768, 1024, device="cuda", dtype=torch.bfloat16) / 32).requires_grad_()
    kept, upstream = torch.zeros(768, 1024, device="cuda"), torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
    out = linear_fp8(x, weight, kept)
    (back, _) = torch.autograd.grad(out, (x, weight), upstream)
    wide = [tensor.detach().double() for tensor in (x, weight, upstream)]
    for found, exact in (
        (out, wide[0] @ wide[1].t()),
        (back, wide[2] @ wide[1]),
        (kept, wide[2].t() @ wide[0]),
    ):
        assert ((found.double() - exact).norm() / exact.norm()).item() < 0.08
