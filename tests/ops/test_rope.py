"""Rotary positions: values by hand, tables, packed sequences, in place, and Megatron's own function."""

import math

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import backend
from megatron_ru.ops.rope import packed_positions, packed_positions_plain, rope, rope_plain, rope_reference, rope_table


@pytest.fixture(autouse=True, params=["all", "none"])
def _both_forms(request):
    with backend.only(request.param):
        yield


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_values_by_hand():
    # A quarter turn sends (1, 0) to (0, 1); position 2 makes it a half turn.
    cos, sin = rope_table(torch.tensor([[0.0, 0.0], [math.pi / 2] * 2, [math.pi] * 2]))
    q = torch.tensor([1.0, 0.0]).expand(3, 1, 1, 2)
    turned, none = rope(q, None, cos, sin)
    assert none is None
    torch.testing.assert_close(turned.reshape(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    back, _ = rope(turned, None, cos, sin, inverse=True)
    torch.testing.assert_close(back, q.contiguous())


def test_layouts_pair_other_channels():
    cos, sin = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    q = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(1, 1, 1, 5)
    assert rope(q, None, cos, sin)[0].flatten().tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0]
    assert rope(q, None, cos, sin, interleaved=True)[0].flatten().tolist() == [-2.0, 1.0, -4.0, 3.0, 5.0]


def test_scores_depend_on_the_distance_alone():
    q, k = random(1, 1, 1, 16).double(), random(1, 1, 1, 16, seed=1).double()
    table = rope_table(64, 16, dtype=torch.float64)

    def score(a, b):
        return (rope(q, None, *table, offset=a)[0] * rope(k, None, *table, offset=b)[0]).sum()

    torch.testing.assert_close(score(7, 3), score(54, 50), rtol=1e-12, atol=1e-12)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_context_parallel_ranks_together_give_the_whole():
    q, k = random(12, 2, 4, 8), random(12, 2, 1, 8, seed=1)
    table = rope_table(12, 8)
    whole = rope(q, k, *table)
    parts = [rope(q[first : first + 4], k[first : first + 4], *table, offset=first) for first in (0, 4, 8)]
    for number in range(2):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])


def test_packed_sequences_begin_anew():
    starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    positions = packed_positions(starts, 10)
    assert positions.dtype == torch.int64
    # The empty sequence takes no place; two tokens of padding count on.
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    tokens, table = random(10, 2, 8), rope_table(16, 8)
    packed, _ = rope(tokens, None, *table, positions=positions)
    alone, _ = rope(tokens[3:8], None, *table)
    assert torch.equal(packed[3:8], alone)


@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 1], [0, 5, 9], [2, 4], [0, 9, 9, 9]])
@pytest.mark.parametrize("total", [0, 1, 9])
def test_packed_positions_of_odd_boundaries(starts, total):
    starts = torch.tensor(starts)
    found = packed_positions(starts, total)
    assert torch.equal(found, packed_positions_plain(starts, total))
    for token in range(total):
        begun = [start for start in starts[:-1].tolist() if start <= token] or [starts[0].item()]
        assert found[token] == token - begun[-1]


def test_table_is_rounded_once():
    cos, sin = rope_table(100_000, 4, base=10000.0)
    assert cos.shape == (100_000, 2)
    assert cos[99_999, 1].item() == torch.tensor(math.cos(999.99), dtype=torch.float32).item()
    assert sin[99_999, 0].item() == torch.tensor(math.sin(99_999.0), dtype=torch.float32).item()
    with pytest.raises(UserError, match="rotary=3: expected an even number"):
        rope_table(10, 3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_megatron_s_angles_and_function(interleaved, percent):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    half = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, int(16 * percent), 2) / 16)[None]
    angles = torch.stack((half, half), dim=-1).flatten(1) if interleaved else torch.cat((half, half), dim=-1)
    freqs = angles[:, None, None, :]
    q, k = random(9, 2, 4, 16), random(9, 2, 2, 16, seed=1)
    table = rope_table(freqs, interleaved=interleaved, scale=1.1)
    for found, x in zip(rope(q, k, *table, interleaved=interleaved), (q, k), strict=True):
        expected = _apply_rotary_pos_emb_bshd(x, freqs, rotary_interleaved=interleaved, mscale=1.1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alone", [False, True])
def test_in_place_writes_over_slices_of_one_tensor_and_nothing_else(alone):
    qkv = random(6, 2, 8, 16)
    before, table = qkv.clone(), rope_table(6, 16)
    q, k = qkv[:, :, :4], None if alone else qkv[:, :, 4:6]
    expected = rope_plain(before[:, :, :4], None if alone else before[:, :, 4:6], *table)
    found = rope(q, k, *table, in_place=True)
    assert found[0].data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(qkv[:, :, :4], expected[0])
    rest = 4 if alone else 6
    if not alone:
        torch.testing.assert_close(qkv[:, :, 4:6], expected[1])
    assert torch.equal(qkv[:, :, rest:], before[:, :, rest:])


def test_in_place_has_gradients():
    weight = random(16, 6 * 16)

    def gradient(in_place):
        leaf = weight.clone().requires_grad_()
        hidden = random(5, 2, 16, seed=2)
        qkv = (hidden @ leaf).view(5, 2, 6, 16)
        q, k = qkv[:, :, :4], qkv[:, :, 4:6]
        if in_place:
            q, k = q.contiguous(), k.contiguous()
        q, k = rope(q, k, *rope_table(5, 16), in_place=in_place)
        (q.square().sum() + (k**3).sum()).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-4)


def test_in_place_of_one_part_only_has_its_gradient():
    x = random(3, 1, 2, 4).requires_grad_()
    k = random(3, 1, 1, 4, seed=1)
    q, _ = rope(x * 1, k, *rope_table(3, 4), in_place=True)
    q.sum().backward()
    expected, _ = rope_reference(torch.ones(3, 1, 2, 4).double(), None, *rope_table(3, 4), inverse=True)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_positions_beyond_the_table_without_positions_are_an_error():
    with pytest.raises((UserError, RuntimeError), match=r"positions 5 to 9 were asked for, but the table has 8 rows"):
        rope(random(4, 1, 1, 4), None, *rope_table(8, 4), offset=5)
