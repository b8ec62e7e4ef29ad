"""Sum and norm in one op, across layers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ru.models.norms import LayerNorm, RMSNorm
from megatron_ru.models.residual import AddThenNorm, link_residuals
from megatron_ru.ops.rms_norm import rms_norm_reference


def plain_sum(training, fused):
    def add(output_with_bias, residual, dropout):
        output, bias = output_with_bias
        return residual + (output if bias is None else output + bias)

    return add


def tensors(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(2)]


def norm(size=16):
    made = RMSNorm(size, 1e-5)
    nn.init.normal_(made.weight)
    return made


class Layer(nn.Module):
    """What a Megatron layer has of sums and norms; its blocks are linears."""

    def __init__(self, norm_type=RMSNorm):
        super().__init__()
        self.input_layernorm, self.pre_mlp_layernorm = (norm_type(16, 1e-5) for _ in range(2))
        self.attention, self.mlp = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.self_attn_bda = self.mlp_bda = plain_sum

    def forward(self, x):
        x = self.self_attn_bda(True, True)((self.attention(self.input_layernorm(x)), None), x, 0.0)
        return self.mlp_bda(True, True)((self.mlp(self.pre_mlp_layernorm(x)), None), x, 0.0)


def block(layers, final, recompute=None):
    config = SimpleNamespace(recompute_granularity=recompute)
    return SimpleNamespace(layers=nn.ModuleList(layers), final_layernorm=final, config=config)


def run(block, x):
    for layer in block.layers:
        x = layer(x)
    return x if block.final_layernorm is None else block.final_layernorm(x)


def test_the_norm_lies_beside_the_sum_and_is_taken_once():
    x, residual = tensors(5, 2, 16)
    made = norm()
    total = AddThenNorm(plain_sum, made)(True, True)((x, None), residual, 0.0)
    torch.testing.assert_close(total, x + residual)
    before = dict(vars(total))
    normed = made(total)
    exact = rms_norm_reference(x + residual, made.weight, 1e-5)
    torch.testing.assert_close(normed.double(), exact, rtol=1e-5, atol=1e-5)
    assert before
    assert not vars(total)
    assert made(total) is not normed


def test_another_norm_computes_by_itself():
    x, residual = tensors(3, 1, 16)
    first, second = norm(), norm()
    total = AddThenNorm(plain_sum, first)(True, True)((x, None), residual, 0.0)
    exact = rms_norm_reference(total, second.weight, 1e-5)
    torch.testing.assert_close(second(total).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bias", "dropout"), [(torch.ones(16), 0.0), (None, 0.1)])
def test_a_bias_or_dropout_goes_megatrons_way(bias, dropout):
    x, residual = tensors(3, 1, 16)
    total = AddThenNorm(plain_sum, norm())(True, True)((x, bias), residual, dropout)
    assert not vars(total)
    torch.testing.assert_close(total, x + residual + (0 if bias is None else bias))


@pytest.mark.parametrize("with_final", [True, False])
def test_linked_layers_give_the_same_values_and_gradients(with_final):
    torch.manual_seed(3)
    linked = block([Layer() for _ in range(3)], norm() if with_final else None)
    x = tensors(4, 2, 16)[0]
    expected = run(linked, x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *linked.layers.parameters()])
    link_residuals(linked)
    added = [isinstance(layer.self_attn_bda, AddThenNorm) for layer in linked.layers]
    across = [isinstance(layer.mlp_bda, AddThenNorm) for layer in linked.layers]
    assert added == [True] * 3
    assert across == [True, True, with_final]
    found = run(linked, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), [x, *linked.layers.parameters()])
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_recomputed_layers_are_linked_inside_alone():
    linked = block([Layer(), Layer()], norm(), recompute="full")
    link_residuals(linked)
    assert all(isinstance(layer.self_attn_bda, AddThenNorm) for layer in linked.layers)
    assert not any(isinstance(layer.mlp_bda, AddThenNorm) for layer in linked.layers)


def test_other_norms_and_norms_that_are_recomputed_stay():
    other, recomputed = Layer(LayerNorm), Layer()
    recomputed.recompute_pre_mlp_layernorm = True
    linked = block([other, recomputed], None)
    link_residuals(linked)
    assert all(layer.self_attn_bda is plain_sum and layer.mlp_bda is plain_sum for layer in (other, recomputed))
