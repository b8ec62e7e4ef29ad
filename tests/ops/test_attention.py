"""Attention against the formula in float64, with and without a mask, with shared key-value heads."""

import math

import pytest
import torch

from megatron_ru.ops.attention import attention, attention_reference


def sample(length, batch, heads, kv_heads, size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, batch, heads, size)] + [(length, batch, kv_heads, size)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_near(found, expected):
    """Contexts are weighted means of values of at most 4; weights and result are rounded, sums run in fp32."""
    atol = 8 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def document_mask(length, cut):
    """True hides: causal, and nothing before `cut` is seen from behind it. [1, 1, length, length]"""
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return ((columns > rows) | ((rows >= cut) & (columns < cut)))[None, None]


# One token; odd lengths and head sizes; multi-head, grouped and multi-query attention.
SHAPES = [(1, 1, 1, 1, 4), (7, 2, 3, 3, 5), (33, 2, 4, 2, 16), (16, 1, 6, 1, 9), (65, 1, 8, 4, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula(shape, masked, dtype):
    q, k, v = sample(*shape, dtype=dtype)
    mask = document_mask(shape[0], shape[0] // 2) if masked else None
    found = attention(q, k, v, mask=mask, scale=None)
    assert found.dtype == dtype
    assert found.shape == q.shape
    assert_near(found, attention_reference(q, k, v, mask=mask, scale=None))


def test_a_mask_of_its_own_for_every_sample():
    q, k, v = sample(12, 3, 4, 2, 8)
    mask = torch.cat([document_mask(12, cut) for cut in (3, 6, 9)])
    found = attention(q, k, v, mask=mask, scale=None)
    for i, cut in enumerate((3, 6, 9)):
        one = [t[:, i : i + 1] for t in (q, k, v)]
        expected = attention_reference(*one, mask=document_mask(12, cut), scale=None)
        assert_near(found[:, i : i + 1], expected)


def test_causal_without_a_mask_is_the_causal_mask():
    q, k, v = sample(19, 2, 4, 4, 8)
    expected = attention(q, k, v, mask=document_mask(19, 0), scale=None)
    torch.testing.assert_close(attention(q, k, v, mask=None, scale=None), expected)


def test_later_tokens_change_nothing_before_them():
    q, k, v = sample(10, 1, 2, 1, 8)
    before = attention(q, k, v, mask=None, scale=None)
    for tensor in (q, k, v):
        tensor[7:] = 100.0
    assert torch.equal(attention(q, k, v, mask=None, scale=None)[:7], before[:7])


def test_the_first_token_sees_itself_alone():
    q, k, v = sample(5, 2, 4, 2, 8)
    out = attention(q, k, v, mask=None, scale=None)
    # Query heads 0 and 1 share key-value head 0; heads 2 and 3 share head 1.
    torch.testing.assert_close(out[0], v[0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("new", [1, 4])
def test_queries_behind_a_cache_are_the_last_positions(new):
    q, k, v = sample(11, 2, 4, 2, 8)
    whole = attention(q, k, v, mask=None, scale=None)
    torch.testing.assert_close(attention(q[-new:], k, v, mask=None, scale=None), whole[-new:])
    assert_near(whole[-new:], attention_reference(q[-new:], k, v, mask=None, scale=None))


def test_scale():
    q, k, v = sample(9, 1, 2, 2, 16)
    assert_near(attention(q, k, v, mask=None, scale=0.5), attention_reference(q, k, v, mask=None, scale=0.5))
    default = attention(q, k, v, mask=None, scale=None)
    torch.testing.assert_close(attention(q, k, v, mask=None, scale=1 / math.sqrt(16)), default)
    # A scale next to zero gives the mean of the values seen so far.
    counts = torch.arange(1, 10)[:, None, None, None]
    torch.testing.assert_close(attention(q, k, v, mask=None, scale=1e-9), v.cumsum(0) / counts)


def test_scores_of_thousands_do_not_overflow():
    q, k, v = sample(8, 1, 2, 2, 16)
    found = attention(q * 300, k * 300, v, mask=None, scale=None)
    assert_near(found, attention_reference(q * 300, k * 300, v, mask=None, scale=None))


def test_strides_do_not_matter():
    # As Megatron hands them over: query, key and value are slices of one projection.
    mixed = torch.randn(6, 2, 4, 3, 8, generator=torch.Generator().manual_seed(3))
    q, k, v = mixed.unbind(3)
    assert not q.is_contiguous()
    found = attention(q, k, v, mask=None, scale=None)
    assert_near(found, attention_reference(q, k, v, mask=None, scale=None))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    q, k, v = (t.requires_grad_() for t in sample(5, 1, 4, 2, 3, dtype=torch.float64))
    mask = document_mask(5, 2) if masked else None
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=mask, scale=None), (q, k, v))


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k, v = sample(16, 4, 4, 4, 8)
    torch.manual_seed(0)
    some = attention(q, k, torch.ones_like(v), mask=None, scale=None, dropout=0.5)
    # Rows of weights sum to one; with half of them dropped and the rest doubled they do so on average only.
    assert some.std() > 0.1
    assert some.mean().item() == pytest.approx(1, abs=0.15)
    torch.manual_seed(0)
    assert torch.equal(some, attention(q, k, torch.ones_like(v), mask=None, scale=None, dropout=0.5))
