"""The layer spec of each kind of variant, and on every Megatron-LM checkout there is."""

import functools
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.core_attention import CoreAttention
from megatron_ru.models.feed_forward import FeedForward
from megatron_ru.models.layer_spec import SpecProvider, _exchange_mlp, layer_spec
from megatron_ru.models.norms import Norm
from megatron_ru.models.positions import SelfAttentionWithPositions
from megatron_ru.models.post_norm import PostNormTransformerLayer
from megatron_ru.models.rotary_attention import RotarySelfAttention
from megatron_ru.models.variant import find_variant


def mlp_class(mlp):
    """The class behind Megatron's description of an MLP, whichever of its forms it has."""
    return mlp.module if isinstance(mlp, ModuleSpec) else getattr(mlp.func, "__self__", mlp.func)


def test_a_llama_layer():
    spec = layer_spec(Namespace(), find_variant("llama2_7b"))
    layer = spec.submodules
    assert spec.module is TransformerLayer
    assert layer.input_layernorm is Norm
    assert layer.pre_mlp_layernorm is Norm
    assert layer.self_attention.module is RotarySelfAttention
    assert layer.self_attention.submodules.core_attention is CoreAttention
    assert layer.self_attention.submodules.q_layernorm is IdentityOp
    assert issubclass(mlp_class(layer.mlp), FeedForward)
    assert mlp_class(layer.mlp).kind == "swiglu"


def test_the_base_of_the_ladder():
    spec = layer_spec(Namespace(), find_variant("gpt2"))
    assert spec.module is PostNormTransformerLayer
    assert spec.submodules.input_layernorm is IdentityOp
    assert spec.submodules.pre_mlp_layernorm is IdentityOp
    assert mlp_class(spec.submodules.mlp).kind == "gelu"


def test_positions_at_every_layer():
    spec = layer_spec(Namespace(), find_variant("gpt2_pos_every_layer"))
    assert spec.submodules.self_attention.module is SelfAttentionWithPositions


@pytest.mark.parametrize("kind", ["relu", "gelu", "swish", "reglu", "geglu", "swiglu"])
def test_each_activation(kind):
    spec = layer_spec(Namespace(), find_variant(f"activation_{kind}"))
    assert mlp_class(spec.submodules.mlp).kind == kind


def test_without_a_variant_megatron_s_arguments_say_it_all():
    plain = layer_spec(Namespace(swiglu=False), None)
    assert mlp_class(plain.submodules.mlp) is MLP
    assert plain.submodules.input_layernorm is Norm
    assert plain.submodules.self_attention.submodules.core_attention is CoreAttention
    assert mlp_class(layer_spec(Namespace(swiglu=True), None).submodules.mlp).kind == "swiglu"


def test_norms_of_queries_and_keys():
    inner = layer_spec(Namespace(qk_layernorm=True), None).submodules.self_attention.submodules
    assert (inner.q_layernorm, inner.k_layernorm) == (Norm, Norm)
    # Megatron's L2 norm has no parameters and stays.
    inner = layer_spec(Namespace(qk_l2_norm=True), None).submodules.self_attention.submodules
    assert inner.q_layernorm is not Norm


def test_latent_attention_stays_megatron_s():
    spec = layer_spec(Namespace(multi_latent_attention=True), None)
    assert spec.submodules.self_attention.module is MLASelfAttention


def test_experts_stay_megatron_s():
    spec = layer_spec(Namespace(num_experts=4, moe_grouped_gemm=False, swiglu=True), None)
    assert not issubclass(mlp_class(spec.submodules.mlp), FeedForward)
    assert spec.submodules.pre_mlp_layernorm is Norm


def test_specs_do_not_share_what_they_change():
    first = layer_spec(Namespace(), find_variant("gpt2"))
    second = layer_spec(Namespace(), find_variant("llama2_7b"))
    assert first.submodules.input_layernorm is IdentityOp
    assert second.submodules.input_layernorm is Norm
    assert second.module is TransformerLayer


def test_a_provider_places_other_ops():
    class OtherNorm(Norm):
        pass

    class OtherAttention(CoreAttention):
        pass

    class OtherFeedForward(FeedForward):
        kind = "swiglu"

    class OtherSelfAttention(SelfAttention):
        pass

    class Provider(SpecProvider):
        def norm(self):
            return OtherNorm

        def self_attention(self):
            return OtherSelfAttention

        def core_attention(self):
            return OtherAttention

        def feed_forward(self, activation):
            assert activation == "swiglu"
            return OtherFeedForward

    layer = layer_spec(Namespace(qk_layernorm=True), find_variant("llama2_7b"), Provider()).submodules
    inner = layer.self_attention.submodules
    assert (layer.input_layernorm, layer.pre_mlp_layernorm, inner.q_layernorm) == (OtherNorm,) * 3
    assert inner.core_attention is OtherAttention
    assert layer.self_attention.module is OtherSelfAttention
    assert mlp_class(layer.mlp) is OtherFeedForward


def test_every_form_in_which_megatron_names_its_mlp():
    class Other(FeedForward):
        kind = "relu"

    class Foreign(MLP):
        @classmethod
        def build(cls):
            return cls

    submodules = object()
    old = _exchange_mlp(ModuleSpec(MLP, {"a": 1}, submodules), Other)
    assert (old.module, old.params, old.submodules) == (Other, {"a": 1}, submodules)
    foreign = ModuleSpec(Foreign)
    assert _exchange_mlp(foreign, Other) is foreign
    foreign = functools.partial(Foreign.build)
    assert _exchange_mlp(foreign, Other) is foreign
    with pytest.raises(UserError, match=r"describes its MLP with a dict, expected a ModuleSpec or a functools.partial"):
        _exchange_mlp({}, Other)


def checkouts():
    """Folders with megatron/core in them, named by MEGATRON_LM_CHECKOUTS directly or as the folder they lie in."""
    found = []
    for name in filter(None, os.environ.get("MEGATRON_LM_CHECKOUTS", "").split(os.pathsep)):
        candidates = [Path(name), *sorted(path for path in Path(name).iterdir() if path.is_dir())]
        found += [path for path in candidates if (path / "megatron" / "core").is_dir()]
    return found


BUILD_IN_CHECKOUT = """
import dataclasses, json, sys
from argparse import Namespace
sys.path.insert(0, sys.argv[1])
import torch
from megatron_ru.seams.cpu_device import CPU_DEVICE
CPU_DEVICE.install()
import torch.distributed
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.package_info import __version__
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_ru.models.initialisation import initialise, initialisation_seams
from megatron_ru.models.layer_spec import layer_spec
from megatron_ru.models.norms import Norm
from megatron_ru.models.variant import find_variant
from megatron_ru.seams.seam import Seam

CPU_DEVICE.install_in_megatron()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
final = Seam(target="megatron.core.transformer.transformer_block:LayerNormImpl", make=lambda _: Norm, reason="tests")
for seam in (final, *initialisation_seams()):
    seam.install()
silu, relu = torch.nn.functional.silu, torch.nn.functional.relu
found = {"megatron": GPTModel.__init__.__code__.co_filename, "version": __version__}
for name in ("llama3_tiny", "gpt2_tiny", "gpt2_pos_every_layer", "activation_reglu"):
    variant = find_variant(name)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=4 // variant.query_heads_per_kv_head,
        ffn_hidden_size=48, normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[variant.norm],
        add_bias_linear=variant.bias, add_qkv_bias=variant.bias, gated_linear_unit=variant.gated,
        activation_func=silu if variant.gated else relu, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, bias_activation_fusion=False, persist_layer_norm=False,
    )
    rope = "rope" if variant.positions == "rope" else "none"
    model = GPTModel(config, layer_spec(Namespace(), variant), 64, 16, position_embedding_type=rope)
    initialise(model, 7)
    ids = torch.arange(16).expand(2, 16)
    losses = model(ids, ids, None, labels=ids.roll(-1, 1))
    losses.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), name
    found[name] = losses.mean().item()
print("FOUND", json.dumps(found))
"""


def built_in(path):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop("PYTHONPATH", None)
    command = [sys.executable, "-W", "ignore", "-c", BUILD_IN_CHECKOUT, str(path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("FOUND ")[2])


@pytest.fixture(scope="module")
def installed_losses(tmp_path_factory):
    # A folder without Megatron: the installed wheel answers.
    return built_in(tmp_path_factory.mktemp("nothing"))


@pytest.mark.hosts
@pytest.mark.skipif(not checkouts(), reason="MEGATRON_LM_CHECKOUTS names no Megatron-LM checkout")
@pytest.mark.parametrize("path", checkouts(), ids=lambda path: path.name)
def test_specs_build_the_same_models_on_every_checkout(path, installed_losses):
    found = built_in(path)
    assert Path(found.pop("megatron")).is_relative_to(path)
    found.pop("version")
    for name, loss in found.items():
        assert loss == pytest.approx(installed_losses[name], rel=1e-6), name
