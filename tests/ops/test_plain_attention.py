import pytest
import torch

from megatron_ru.ops.attention import attention
from megatron_ru.ops.plain_attention import plain_attention


@pytest.mark.parametrize("grouped", [False, True])
def test_same_as_the_fused_one(grouped):
    torch.manual_seed(1)
    # 7 positions, 6 query heads over 3 key heads.
    query = torch.randn(7, 2, 6, 4, requires_grad=True)
    key, value = (torch.randn(7, 2, 3, 4, requires_grad=True) for _ in range(2))
    given = query.unflatten(2, (3, 2)) if grouped else query
    found = plain_attention(given, key, value, mask=None, scale=None)
    expected = attention(query, key, value, mask=None, scale=None)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_masks_and_scale():
    torch.manual_seed(2)
    query, key, value = (torch.randn(5, 1, 2, 4) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask[4, 2] = True
    found = plain_attention(query, key, value, mask=mask, scale=0.3)
    torch.testing.assert_close(found, attention(query, key, value, mask=mask, scale=0.3))
    assert not torch.allclose(found, plain_attention(query, key, value, mask=None, scale=0.3))
