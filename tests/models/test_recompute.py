"""Recomputation that is set on layers which are built already."""

import pytest
import torch

from megatron_ru.models.recompute import recomputable, recompute_layers, recompute_parts
from megatron_ru.models.recompute_plan import WHOLE
from megatron_ru.models.residual import AddThenNorm

WAYS = {
    "nothing": [(), (), (), ()],
    "whole": [WHOLE] * 4,
    "some": [WHOLE, WHOLE, (), ()],
    "parts": [("mlp", "core_attn"), ("mlp",), ("core_attn",), ()],
    "mixed": [WHOLE, ("mlp",), ("core_attn",), ()],
}


@pytest.fixture(scope="module", params=["llama3_tiny", "gpt2_tiny"])
def model(request, build_gpt):
    return build_gpt(request.param, sizes={"num_layers": 4}, ops="none")


def trained(model, variant):
    """(losses, gradients) of one batch, the calls of MLPs in its forward and backward."""
    model.train().zero_grad()
    ids = torch.arange(2 * variant.seq_length).reshape(2, -1) * 7 % variant.vocab_size
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(model.decoder.layers)
    ]
    losses = model(ids, torch.arange(variant.seq_length).expand(2, -1), None, labels=ids.roll(-1, 1))
    losses.mean().backward()
    for hook in hooks:
        hook.remove()
    return losses.detach(), [parameter.grad.clone() for parameter in model.parameters()], sorted(calls)


@pytest.mark.parametrize("name", WAYS)
def test_losses_and_gradients_have_the_bits_of_no_recomputation(model, name):
    gpt, variant = model
    recompute_layers(gpt.decoder, [()] * 4)
    losses, gradients, calls = trained(gpt, variant)
    assert calls == [0, 1, 2, 3]
    recompute_layers(gpt.decoder, WAYS[name])
    found, others, calls = trained(gpt, variant)
    assert torch.equal(found, losses)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    # What is computed again is called again, and once.
    parts = recomputable(gpt.decoder.layers[0])
    again = [number for number, way in enumerate(WAYS[name]) if way == WHOLE or "mlp" in {*way} & {*parts}]
    assert calls == sorted([0, 1, 2, 3, *again])


def test_sums_and_norms_stay_together_where_no_layer_is_recomputed_whole(build_gpt):
    gpt, variant = build_gpt("llama3_tiny", sizes={"num_layers": 4})
    linked = [isinstance(layer.mlp_bda, AddThenNorm) for layer in gpt.decoder.layers]
    assert linked == [True] * 4
    losses, gradients, _ = trained(gpt, variant)
    for name, across in (("mixed", [False, True, True, True]), ("whole", [False] * 4), ("nothing", [True] * 4)):
        recompute_layers(gpt.decoder, WAYS[name])
        assert [isinstance(layer.mlp_bda, AddThenNorm) for layer in gpt.decoder.layers] == across
        found, others, _ = trained(gpt, variant)
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)


def test_the_config_says_how_many_layers_are_whole(model):
    gpt, _ = model
    config = gpt.decoder.config
    for name, expected in (("some", ("full", "block", 2)), ("parts", (None, None, None))):
        recompute_layers(gpt.decoder, WAYS[name])
        found = config.recompute_granularity, config.recompute_method, config.recompute_num_layers
        assert found == expected


def test_an_mlp_with_biases_is_not_recomputed_by_itself(model):
    gpt, variant = model
    layer = gpt.decoder.layers[0]
    assert recomputable(layer) == (["core_attn"] if variant.name == "gpt2_tiny" else ["core_attn", "mlp"])


def test_parts_are_switched_one_by_one(build_gpt):
    layer = build_gpt("llama3_tiny")[0].decoder.layers[0]
    recompute_parts(layer, ["mlp"])
    assert (layer.self_attention.checkpoint_core_attention, layer.recompute_mlp) == (False, True)
    recompute_parts(layer, [])
    assert (layer.self_attention.checkpoint_core_attention, layer.recompute_mlp) == (False, False)
    assert recomputable(torch.nn.Linear(2, 2)) == []
