"""Queries and keys rotated in one call, inside Megatron's own attention."""

import pytest
import torch

from megatron_ru.models import rotary_attention
from megatron_ru.models.rotary_attention import RotarySelfAttention
from megatron_ru.ops import backend
from tests.compiled_calls import needs_library
from tests.models.test_gpt_model import ids_and_positions, randomise


@pytest.fixture
def rotations(monkeypatch):
    """(heads of the queries, heads of the keys) of each call of the op, on both or on what the projection gave."""
    calls = []
    rope, rotary_qkv = rotary_attention.rope, rotary_attention.rotary_qkv

    def counted(q, k, *arguments, **keywords):
        calls.append((q.shape[2], k.shape[2]))
        return rope(q, k, *arguments, **keywords)

    def counted_whole(qkv, *arguments, **keywords):
        groups, heads = qkv.shape[2:4]
        calls.append((groups * (heads - 2), groups))
        return rotary_qkv(qkv, *arguments, **keywords)

    monkeypatch.setattr(rotary_attention, "rope", counted)
    monkeypatch.setattr(rotary_attention, "rotary_qkv", counted_whole)
    return calls


def gradients(model, variant, *, train=False):
    """(losses, gradients by name) of one batch."""
    model.train(train).zero_grad()
    ids, positions = ids_and_positions(variant)
    losses = model(ids, positions, None, labels=ids.roll(-1, 1))
    losses.mean().backward()
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


CONFIGS = {
    "plain": ({}, {}),
    "partial": ({}, {"rotary_percent": 0.5}),
    "interleaved": ({"rotary_interleaved": True}, {}),
    "query and key norms": ({"qk_l2_norm": True}, {}),
    "recompute": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, {},
    ),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", ["llama2_tiny", "llama3_tiny"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_gives_what_it_gives_with_megatron_s_rotation(build_gpt, rotations, name, case):
    config, keywords = CONFIGS[case]
    model, variant = build_gpt(name, config=config, model={})
    if keywords:
        # The builder says the variant's own part; the embedding is what counts.
        embedding = model.rotary_pos_emb
        embedding.inv_freq = embedding.inv_freq[: int(len(embedding.inv_freq) * keywords["rotary_percent"])]
        type(embedding).forward.cache_clear()
    randomise(model)
    attention = model.decoder.layers[0].self_attention
    assert type(attention) is RotarySelfAttention
    with backend.only("rope"):
        losses, found = gradients(model, variant, train=case == "recompute")
    heads = (variant.num_attention_heads, variant.num_query_groups)
    assert rotations == [heads] * (variant.num_layers * (2 if case == "recompute" else 1))
    with backend.only("none"):
        expected_losses, expected = gradients(model, variant, train=case == "recompute")
    assert len(rotations) == variant.num_layers * (2 if case == "recompute" else 1)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=key)


@needs_library
def test_yarn_s_factor_scales_both(build_gpt, rotations):
    model, variant = build_gpt("llama2_tiny")
    randomise(model)
    with backend.only("none"):
        plain, _ = gradients(model, variant)
    for layer in model.decoder.layers:
        # What Megatron computes from a YaRN config, under both names that it has had.
        layer.self_attention._scale = layer.self_attention._yarn_concentration_factor = 1.3
    with backend.only("none"):
        expected_losses, expected = gradients(model, variant)
    assert (expected_losses - plain).abs().max() > 1e-3, "the factor must matter"
    assert rotations == []
    with backend.only("rope"):
        losses, found = gradients(model, variant)
    assert len(rotations) == variant.num_layers
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=key)


def angles_and_input(model, variant):
    length = variant.seq_length
    return model.rotary_pos_emb(length), torch.randn(length, 2, variant.hidden_size)


@needs_library
def test_one_tensor_of_angles_for_both_or_megatron_s_own_way(build_gpt, rotations):
    model, variant = build_gpt("llama2_tiny")
    attention = randomise(model).decoder.layers[0].self_attention
    angles, x = angles_and_input(model, variant)
    expected, _ = attention(x, attention_mask=None, rotary_pos_emb=angles)
    assert len(rotations) == 1
    both, _ = attention(x, attention_mask=None, rotary_pos_emb=(angles, angles))
    assert torch.equal(both, expected)
    assert len(rotations) == 2
    # Each its own angles, and arguments by position: nothing that training does.
    apart, _ = attention(x, attention_mask=None, rotary_pos_emb=(angles, angles.clone()))
    by_position, _ = attention(x, None, None, None, angles)
    assert len(rotations) == 2
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_position, expected, rtol=1e-5, atol=1e-5)
    without, _ = attention(x, attention_mask=None, rotary_pos_emb=None)
    assert (without - expected).abs().max() > 1e-3
    assert len(rotations) == 2


@needs_library
def test_a_layer_without_rotation_stays_without(build_gpt, rotations):
    # Every second layer, as some long-context models have it.
    model, variant = build_gpt("llama2_tiny", config={"no_rope_freq": [0, 1]})
    randomise(model)
    with backend.only("none"):
        expected, _ = gradients(model, variant)
    with backend.only("rope"):
        found, _ = gradients(model, variant)
    assert len(rotations) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_the_op_does_not_take_is_rotated_by_megatron(build_gpt, rotations):
    model, variant = build_gpt("llama2_tiny")
    model = randomise(model).double()
    angles, x = angles_and_input(model, variant)
    attention = model.decoder.layers[0].self_attention
    with backend.only("all"):
        found, _ = attention(x.double(), attention_mask=None, rotary_pos_emb=angles)
    with backend.only("none"):
        expected, _ = attention(x.double(), attention_mask=None, rotary_pos_emb=angles)
    assert rotations == []
    assert torch.equal(found, expected)


@needs_library
def test_a_failed_step_leaves_nothing_behind(build_gpt, monkeypatch):
    model, variant = build_gpt("llama2_tiny")
    attention = model.decoder.layers[0].self_attention
    angles, x = angles_and_input(model, variant)
    with pytest.raises(RuntimeError):
        attention(x[..., :-1], attention_mask=None, rotary_pos_emb=angles)
    query, _, _ = attention.get_query_key_value_tensors(x)
    mixed, _ = attention.linear_qkv(x)
    assert torch.equal(query[:, :, 0], mixed[..., : query.shape[-1]]), "rotated outside a forward"
