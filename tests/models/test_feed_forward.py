"""The feed-forward block with each activation."""

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from megatron_ru.models.feed_forward import FeedForward, with_activation
from megatron_ru.ops.activation import ACTIVATIONS, activation_reference, is_gated

KINDS = ("relu", "gelu", "swish", "reglu", "geglu", "swiglu")


def block(build_gpt, kind, bias=True):
    name = f"activation_{kind}" + ("" if bias else "_nobias")
    model, variant = build_gpt(name, sizes={"num_layers": 1})
    return model.decoder.layers[0].mlp, variant, model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_formula(build_gpt, kind, bias):
    mlp, variant, _ = block(build_gpt, kind, bias)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(5, 2, variant.hidden_size, generator=generator)
    output, output_bias = mlp(x)

    weights = {name: weight.double() for name, weight in mlp.named_parameters()}
    inner = activation_reference(x.double() @ weights["linear_fc1.weight"].T, weights.get("linear_fc1.bias"), kind)
    torch.testing.assert_close(output.double(), inner @ weights["linear_fc2.weight"].T, rtol=1e-5, atol=1e-5)
    # The second bias is left to bias-dropout-add.
    assert (output_bias is mlp.linear_fc2.bias) if bias else (output_bias is None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_doubles_the_first_projection_alone(build_gpt, kind):
    mlp, variant, _ = block(build_gpt, kind)
    width = variant.ffn_hidden_size
    assert mlp.linear_fc1.weight.shape == (width * (2 if kind in ("reglu", "geglu", "swiglu") else 1), 32)
    assert mlp.linear_fc1.bias.shape == mlp.linear_fc1.weight.shape[:1]
    assert mlp.linear_fc2.weight.shape == (32, width)
    assert mlp.config.gated_linear_unit is is_gated(kind)


@pytest.mark.parametrize("kind", ["relu", "reglu"])
def test_the_kind_decides_whatever_the_config_says(build_gpt, kind):
    # Megatron sets gated_linear_unit by --swiglu; a host's config may come from anywhere.
    config = {"gated_linear_unit": not is_gated(kind)}
    model, variant = build_gpt(f"activation_{kind}", sizes={"num_layers": 1}, config=config)
    layer = model.decoder.layers[0]
    assert layer.mlp.linear_fc1.weight.shape[0] == variant.ffn_hidden_size * (2 if is_gated(kind) else 1)
    assert model.config.gated_linear_unit is not is_gated(kind), "the model's own config was changed"


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_classes_have_names_of_their_own(kind):
    cls = with_activation(kind)
    assert issubclass(cls, FeedForward)
    assert issubclass(cls, MLP)
    assert (cls.__name__, cls.kind, cls.__module__) == (f"FeedForward_{kind}", kind, "megatron_ru.models.feed_forward")


def test_a_scale_per_token_goes_to_megatron_s_own_form(build_gpt):
    # Experts weigh their tokens between the projections; that is Megatron's forward, with its own activation.
    mlp, variant, _ = block(build_gpt, "swiglu", bias=False)
    x = torch.randn(3, 1, variant.hidden_size)
    whole, _ = mlp(x)
    scaled, _ = mlp(x, per_token_scale=torch.full((3, 1), 0.5))
    torch.testing.assert_close(scaled, whole / 2)
