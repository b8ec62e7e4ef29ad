"""The activations against their float64 formulas."""

import math

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.variant import ACTIVATIONS as VARIANT_ACTIVATIONS
from megatron_ru.models.variant import GATED_ACTIVATIONS
from megatron_ru.ops.activation import ACTIVATIONS, activation, activation_reference, is_gated


def sample(kind, rows=(5, 3), width=33, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width *= 2 if is_gated(kind) else 1
    x = torch.randn(*rows, width, generator=generator, dtype=torch.float64) * 2
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    return x.to(dtype), bias.to(dtype)


def assert_near(found, expected):
    """One rounding each for the sum with the bias, the activation and the product; slopes are at most 1.13, and the
    error of one half is multiplied by the other half, here below 12."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=12 * eps)


def test_variants_and_the_op_know_the_same_kinds():
    assert set(ACTIVATIONS) == set(VARIANT_ACTIVATIONS)
    assert {kind for kind in ACTIVATIONS if is_gated(kind)} == set(GATED_ACTIVATIONS)


# x = 2 and, for the gated kinds, an up projection of 3.
BY_HAND = {
    "relu": 2.0,
    "gelu": 2 * 0.5 * (1 + math.erf(2**0.5)),
    "gelu_tanh": 1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8)),
    "swish": 2 / (1 + math.exp(-2)),
    "reglu": 6.0,
    "geglu": 3 * 2 * 0.5 * (1 + math.erf(2**0.5)),
    "swiglu": 3 * 2 / (1 + math.exp(-2)),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_by_hand(kind):
    x = torch.tensor([2.0, 3.0] if is_gated(kind) else [2.0], dtype=torch.float64)
    assert activation(x, None, kind).tolist() == pytest.approx([BY_HAND[kind]], rel=1e-12)
    # A bias moves both halves before anything else happens.
    half = x / 2
    assert activation(half, half, kind).tolist() == pytest.approx([BY_HAND[kind]], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_formula(kind, with_bias, dtype):
    x, bias = sample(kind, dtype=dtype)
    bias = bias if with_bias else None
    found = activation(x, bias, kind)
    expected = activation_reference(x, bias, kind)
    assert found.dtype == dtype
    assert found.shape == (5, 3, 33)
    assert_near(found, expected)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(1,), (0,), (2, 1, 3)])
def test_odd_shapes_and_strides(kind, rows):
    x, bias = sample(kind, rows, width=7, dtype=torch.float32)
    assert_near(activation(x, bias, kind), activation_reference(x, bias, kind))
    strided = torch.stack((x, x + 1), dim=-1)[..., 1]
    assert strided.is_contiguous() == (strided.numel() < 2)
    assert_near(activation(strided, None, kind), activation_reference(strided, None, kind))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_from_zero_it_is_the_identity_or_zero(kind, dtype):
    ones = torch.ones(2, dtype=dtype)
    for x, expected in ((60.0, 60.0), (-60.0, 0.0)):
        gate = torch.full((2,), x, dtype=dtype)
        found = activation(torch.cat((gate, ones)) if is_gated(kind) else gate, None, kind)
        # swish(-60) is -5e-25: zero in every dtype but fp32, which keeps it.
        assert found.double().tolist() == pytest.approx([expected] * 2, abs=1e-20)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradients(kind):
    # ReLU has no derivative at zero; these samples keep 1e-3 away from it.
    x, bias = sample(kind, rows=(3,), width=5)
    assert (x + bias).abs().min() > 1e-3
    arguments = (x.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, bias: activation(x, bias, kind), arguments)


def test_the_gate_is_the_first_half():
    x = torch.tensor([-1.0, 5.0])
    assert activation(x, None, "reglu").item() == 0.0
    assert activation(x.flip(0), None, "reglu").item() == -5.0


def test_unknown_kind():
    with pytest.raises(UserError) as error:
        activation(torch.zeros(2), None, "mish")
    assert str(error.value) == (
        "activation 'mish' is unknown, expected one of relu, gelu, gelu_tanh, swish, reglu, geglu, swiglu"
    )
