"""Attention on a GPU: right values, and no scores in memory."""

import pytest
import torch

from megatron_ru.ops.attention import attention, attention_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(8, 8, 64), (8, 2, 128), (4, 1, 96)])
@pytest.mark.parametrize("length", [1, 77, 512])
def test_attention_equals_the_formula(heads, kv_heads, head_size, length):
    torch.manual_seed(0)
    query = torch.randn(length, 2, heads, head_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(length, 2, kv_heads, head_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = attention(query, key, value, mask=None, scale=None)
    expected = attention_reference(query, key, value, mask=None, scale=None)
    # bf16 keeps 8 bits: 2^-8 of values of order one, twice for the two matrix products.
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)
    found.float().square().sum().backward()
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_fp32_and_under_a_mask(kv_heads, masked):
    torch.manual_seed(0)
    query = torch.randn(65, 2, 8, 64, device="cuda", requires_grad=True)
    key, value = (torch.randn(65, 2, kv_heads, 64, device="cuda") for _ in range(2))
    mask = torch.ones(65, 65, device="cuda", dtype=torch.bool).triu(1)
    mask[40:, :40] = True
    mask = mask[None, None] if masked else None
    found = attention(query, key, value, mask=mask, scale=None)
    expected = attention_reference(query, key, value, mask=mask, scale=None)
    # The kernel may use TF32-like tiles; fp32 sums of 65 products differ in the last places.
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    found.square().sum().backward()
    assert torch.isfinite(query.grad).all()


def test_attention_of_a_long_sequence_does_not_hold_the_scores():
    length, heads = 16384, 8
    query, key, value = (torch.randn(length, 1, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(query, key, value, mask=None, scale=None)
    extra = torch.cuda.max_memory_allocated() - before
    scores = heads * length * length * 2
    assert extra < scores / 10
