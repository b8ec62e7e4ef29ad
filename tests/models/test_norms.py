"""Norm modules as Megatron's spec builds them."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.norms import LayerNorm, Norm, RMSNorm
from megatron_ru.ops.layer_norm import layer_norm_reference
from megatron_ru.ops.rms_norm import rms_norm_reference


def config(**changes):
    settings = {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": False, "sequence_parallel": False}
    return SimpleNamespace(**settings | changes)


def test_the_config_chooses_the_norm():
    rms = Norm(config=config(), hidden_size=6, eps=1e-6)
    assert type(rms) is RMSNorm
    assert rms.eps == 1e-6
    layer = Norm(config=config(normalization="LayerNorm"), hidden_size=6)
    assert type(layer) is LayerNorm
    assert layer.eps == 1e-5


def test_unknown_norm():
    with pytest.raises(UserError, match=r"^--normalization L2Norm is unknown, expected RMSNorm or LayerNorm$"):
        Norm(config=config(normalization="L2Norm"), hidden_size=6)


def test_later_keywords_of_megatron_are_accepted():
    found = Norm(config=config(), hidden_size=6, eps=1e-5, persist_layer_norm=False, has_residual=True)
    assert type(found) is RMSNorm


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_parameters_begin_as_the_identity_and_are_used(kind, zero_centered):
    norm = Norm(config=config(normalization=kind, layernorm_zero_centered_gamma=zero_centered), hidden_size=5, eps=1e-3)
    assert norm.weight.tolist() == [0.0 if zero_centered else 1.0] * 5
    names = [name for name, _ in norm.named_parameters()]
    assert names == (["weight"] if kind == "RMSNorm" else ["weight", "bias"])
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    x = torch.randn(3, 2, 5)
    if kind == "RMSNorm":
        expected = rms_norm_reference(x, norm.weight, 1e-3, zero_centered)
    else:
        expected = layer_norm_reference(x, norm.weight, norm.bias, 1e-3, zero_centered)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_marked_for_sequence_parallelism(kind, sequence_parallel):
    norm = Norm(config=config(normalization=kind, sequence_parallel=sequence_parallel), hidden_size=4)
    assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * len(list(norm.parameters()))
    assert norm.weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_weights_of_another_dtype_than_the_input(kind, x_dtype, weight_dtype):
    # A half-precision model whose norms are kept in fp32, and fp32 residuals in a half-precision model.
    norm = Norm(config=config(normalization=kind, sequence_parallel=True), hidden_size=33, eps=1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    norm = norm.to(weight_dtype)
    assert norm.weight.sequence_parallel is True, "the mark was lost in the conversion"
    x = torch.randn(7, 2, 33).to(x_dtype).requires_grad_()
    reference = rms_norm_reference if kind == "RMSNorm" else layer_norm_reference
    rest = () if kind == "RMSNorm" else (norm.bias,)
    expected = reference(x, norm.weight, *rest, 1e-5)
    found = norm(x)
    assert found.dtype == x_dtype
    ulp = torch.finfo(x_dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=2 * ulp, atol=1e-5)
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape)
    found.backward(upstream.to(x_dtype))
    gradients = torch.autograd.grad(expected, [x, *norm.parameters()], upstream.to(x_dtype).double())
    for leaf, gradient in zip([x, *norm.parameters()], gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        wide = torch.finfo(leaf.dtype).eps * gradient.abs().max().item()
        torch.testing.assert_close(leaf.grad.double(), gradient.double(), rtol=0.01, atol=2 * wide + 1e-4)


def test_on_the_cpu_layer_parameters_are_on_the_cpu(cpu_device):
    assert Norm(config=config(), hidden_size=4).weight.device == torch.device("cpu")
