"""Sine and cosine positions at the input and at every layer."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_ru.models.positions import SelfAttentionWithPositions, SinusoidalPositions
from megatron_ru.ops.sinusoidal import sinusoidal_table


def scaled_table(length, hidden, dtype=torch.float32):
    """The table in the proportion to the embeddings that its source gives it."""
    return (sinusoidal_table(length, hidden, torch.float64) / hidden**0.5).to(dtype)


def test_a_lookup_without_parameters():
    positions = SinusoidalPositions(10, 6)
    ids = torch.tensor([[0, 1, 2], [7, 0, 9]])
    assert torch.equal(positions(ids), scaled_table(10, 6)[ids])
    assert not list(positions.parameters())
    # A checkpoint holds no table, and one that does not can be read.
    assert not positions.state_dict()
    positions.load_state_dict({})
    assert positions.bfloat16()(ids).dtype == torch.bfloat16
    half = SinusoidalPositions(10, 6, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(half.table, scaled_table(10, 6, torch.bfloat16))


def test_at_the_input_the_table_stands_for_the_learned_one(build_gpt):
    model, variant = build_gpt("gpt2_tiny")
    assert isinstance(model.embedding.position_embeddings, SinusoidalPositions)
    ids, positions = torch.tensor([[3, 1, 4]]), torch.tensor([[0, 1, 2]])
    words = model.embedding.word_embeddings(ids)
    expected = words + scaled_table(3, variant.hidden_size)
    torch.testing.assert_close(model.embedding(ids, positions), expected.transpose(0, 1))
    assert not [name for name in model.state_dict() if "position" in name]


def test_learned_positions_stay_learned(build_gpt):
    model, variant = build_gpt("rugpt3_13b")
    table = model.embedding.position_embeddings.weight
    assert table.shape == (variant.position_count, variant.hidden_size)
    assert table.requires_grad


@pytest.fixture(scope="module")
def attention(build_gpt):
    model, _ = build_gpt("gpt2_pos_every_layer")
    assert all(type(layer.self_attention) is SelfAttentionWithPositions for layer in model.decoder.layers)
    return model.decoder.layers[0].self_attention.eval()


def without_positions(attention, x):
    return super(SelfAttentionWithPositions, attention).forward(x, None)


def test_every_layer_adds_the_table_to_its_input(attention):
    x = torch.randn(7, 2, 32)
    found, bias = attention(x, None)
    expected, _ = without_positions(attention, x + sinusoidal_table(7, 32)[:, None])
    assert torch.equal(found, expected)
    assert bias is attention.linear_proj.bias
    assert not torch.allclose(found, without_positions(attention, x)[0])


def test_the_table_grows_and_follows_the_dtype(attention):
    for length, dtype in ((3, torch.float32), (11, torch.float32), (5, torch.float32), (5, torch.bfloat16)):
        like = torch.zeros(1, dtype=dtype)
        table = attention._table(length, 32, like)
        assert table.dtype == dtype
        assert torch.equal(table[:length], sinusoidal_table(length, 32, dtype))
    assert not [name for name in attention.state_dict() if "table" in name]


def test_with_sequence_parallelism_a_rank_adds_its_own_rows(attention, monkeypatch):
    seen = []
    cls = type(attention).__mro__[1]
    monkeypatch.setattr(cls, "forward", lambda self, hidden, *rest, **more: seen.append(hidden))
    monkeypatch.setattr(attention.config, "sequence_parallel", True)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 4)
    whole = torch.randn(12, 2, 32)
    for rank, part in enumerate(whole.chunk(4)):
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        attention(part, None)
    torch.testing.assert_close(torch.cat(seen), whole + sinusoidal_table(12, 32)[:, None])
