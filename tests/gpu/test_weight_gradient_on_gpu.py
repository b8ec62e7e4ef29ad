"""Weight gradients that a product on a GPU writes to their buffer, and adds to it."""

import pytest
import torch

from megatron_ru.ops.weight_gradient import add_weight_gradient, await_first

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kept_type", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_first_is_written_and_others_added(dtype, kept_type):
    generator = torch.Generator().manual_seed(0)
    gradient, given = (torch.randn(777, size, generator=generator).to("cuda", dtype) for size in (136, 264))
    exact = gradient.double().t() @ given.double()
    kept = torch.full((136, 264), torch.nan, device="cuda", dtype=kept_type or dtype)
    await_first(kept)
    rounding = torch.finfo(kept.dtype).eps
    for times in (1, 2, 3):
        add_weight_gradient(kept, gradient, given)
        error = (kept.double() - times * exact).abs().max() / exact.abs().max()
        assert error.item() < max(8 * rounding, 1e-5)
