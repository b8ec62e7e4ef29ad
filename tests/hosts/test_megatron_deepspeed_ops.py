"""The ops at the host's own places: the host's numbers, its dtypes and its marks."""

import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from megatron_ru.hosts import megatron_deepspeed_ops as host_ops
from megatron_ru.ops import backend
from tests.compiled_calls import CompiledCalls, needs_library


class HostRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6, sequence_parallel=False):
        super().__init__()


class HostLayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()


def rotate_half(t):
    first, second = t.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(t, freqs):
    freqs = freqs[: t.shape[0]]
    rotary = freqs.shape[-1]
    t, rest = t[..., :rotary], t[..., rotary:]
    return torch.cat((t * freqs.cos() + rotate_half(t) * freqs.sin(), rest), dim=-1)


class ParallelMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.swiglu = config.swiglu
        self.activation_func = lambda x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]


@pytest.fixture
def host(monkeypatch):
    """The modules that use norms, rotations and activations, as the host has them."""
    transformer, gpt = ModuleType("megatron.model.transformer"), ModuleType("megatron.model.gpt_model")
    transformer.apply_rotary_pos_emb = apply_rotary_pos_emb
    transformer.ParallelMLP = ParallelMLP
    transformer.bias_gelu_impl = lambda input, bias: functional.gelu(input + bias, approximate="tanh")
    for module in (transformer, gpt):
        module.RMSNorm, module.LayerNorm = HostRMSNorm, HostLayerNorm
        monkeypatch.setitem(sys.modules, module.__name__, module)
    accelerator = ModuleType("deepspeed.accelerator")
    accelerator.get_accelerator = lambda: SimpleNamespace(current_device_name=lambda: "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
    return transformer, gpt


@pytest.fixture
def install():
    """install(words) installs the seams of these ops; all are taken back afterwards."""
    installed = []
    before = ",".join(backend.selected()) or "none"

    def put(words, **arguments):
        backend.select(words)
        args = Namespace(**{"params_dtype": torch.float32, "kd": False, "mos": False, **arguments})
        for seam in host_ops.op_seams(args):
            assert seam.install()
            installed.append(seam)
        return [seam.target for seam in installed]

    yield put
    for seam in reversed(installed):
        seam.undo()
    backend.select(before)


def test_every_name_is_replaced_and_given_back(host, install):
    transformer, gpt = host
    places = {
        "rms_norm": [(transformer, "RMSNorm"), (gpt, "RMSNorm")],
        "layer_norm": [(transformer, "LayerNorm"), (gpt, "LayerNorm")],
        "rope": [(transformer, "apply_rotary_pos_emb")],
        "activation": [(transformer.ParallelMLP, "__init__"), (transformer, "bias_gelu_impl")],
    }
    before = {(owner, name): getattr(owner, name) for pairs in places.values() for owner, name in pairs}
    seams = []
    for op, pairs in places.items():
        backend.select(op)
        seams = host_ops.op_seams(Namespace(params_dtype=torch.float32, kd=False, mos=False))
        for seam in seams:
            seam.install()
        changed = {key for key, value in before.items() if getattr(*key) is not value}
        assert changed == set(pairs), op
        for seam in reversed(seams):
            seam.undo()
    assert all(getattr(*key) is value for key, value in before.items())
    assert install("none") == []


def test_distillation_keeps_the_host_s_loss(host, install):
    assert install("cross_entropy") == ["megatron.core.tensor_parallel:vocab_parallel_cross_entropy"]


@pytest.mark.parametrize("flag", ["kd", "mos"])
def test_distillation_reads_the_logits_again(host, install, flag):
    assert install("cross_entropy", **{flag: True}) == []


def test_norms_have_the_host_s_arguments_dtype_and_mark(host, install):
    transformer, gpt = host
    install("rms_norm,layer_norm", params_dtype=torch.bfloat16)
    norm = gpt.RMSNorm(8, 1e-3, sequence_parallel=True)
    # DeepSpeed's pipeline builds its layers from classes of torch.nn.Module, and asks for nothing else.
    assert issubclass(gpt.RMSNorm, nn.Module)
    assert [(name, p.dtype, p.sequence_parallel) for name, p in norm.named_parameters()] == [
        ("weight", torch.bfloat16, True)
    ]
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3)
    assert torch.allclose(norm(x).double(), expected, atol=0.02)
    layer = transformer.LayerNorm(
        8, eps=1e-5, no_persist_layer_norm=True, sequence_parallel=False, apply_layernorm_1p=True, mem_efficient_ln=True
    )
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not layer.weight.any(), "counted from one"
    expected = functional.layer_norm(wide, (8,))
    assert torch.allclose(layer(x).double(), expected, atol=0.02)


@needs_library
@pytest.mark.parametrize("length", [16, 9])
def test_rotations_are_the_host_s(host, install, length):
    """Shorter sequences than the table come with a curriculum."""
    transformer, _ = host
    angles = torch.outer(torch.arange(16.0), 10000.0 ** -(torch.arange(0, 6, 2) / 6)).repeat(1, 2)[:, None, None]
    t = torch.randn(length, 2, 3, 8, requires_grad=True)
    expected = apply_rotary_pos_emb(t, angles)
    (gradient,) = torch.autograd.grad(expected.square().sum(), t)
    install("rope")
    with CompiledCalls() as calls:
        found = transformer.apply_rotary_pos_emb(t, angles)
    assert calls.calls
    (found_gradient,) = torch.autograd.grad(found.square().sum(), t)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found_gradient, gradient, atol=1e-5)


@needs_library
def test_swiglu_is_the_host_s_and_other_activations_stay(host, install):
    transformer, _ = host
    x = torch.randn(5, 2, 12, requires_grad=True)
    expected = ParallelMLP(SimpleNamespace(swiglu=True)).activation_func(x)
    install("activation")
    with CompiledCalls() as calls:
        found = transformer.ParallelMLP(SimpleNamespace(swiglu=True)).activation_func(x)
    assert calls.calls
    assert torch.allclose(found, expected, atol=1e-6)
    plain = transformer.ParallelMLP(SimpleNamespace(swiglu=False))
    with CompiledCalls() as calls:
        plain.activation_func(x)
    assert not calls.calls


def test_what_an_op_cannot_take_is_the_host_s(host, install):
    transformer, _ = host
    install("rope")
    angles = torch.zeros(4, 1, 1, 8)
    handed = transformer.apply_rotary_pos_emb(torch.ones(4, 1, 1, 8, dtype=torch.float64), angles)
    assert torch.equal(handed, torch.ones(4, 1, 1, 8, dtype=torch.float64))
