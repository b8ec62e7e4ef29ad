"""The layer of a variant as a Megatron spec: Megatron's own local spec with a few fields exchanged."""

import dataclasses
import functools
import inspect
from typing import Any, Protocol

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.core_attention import CoreAttention
from megatron_ru.models.feed_forward import with_activation
from megatron_ru.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_ru.models.norms import Norm
from megatron_ru.models.positions import SelfAttentionWithPositions
from megatron_ru.models.post_norm import PostNormTransformerLayer
from megatron_ru.models.rotary_attention import RotarySelfAttention


class Architecture(Protocol):
    """What a layer must know of a variant."""

    positions: str
    norm_placement: str
    activation: str


class SpecProvider:
    """Where ops find their place: the module for each part of a layer. A new op changes one method here."""

    def norm(self) -> Any:
        """Builder of the norms of the layers, of queries and keys, and of the final norm."""
        return Norm

    def self_attention(self) -> type[SelfAttention]:
        """Module that makes queries, keys and values and rotates the first two."""
        return RotarySelfAttention

    def core_attention(self) -> type:
        """Module that turns queries, keys and values into contexts."""
        return CoreAttention

    def feed_forward(self, activation: str) -> type[MLP]:
        """Module of the feed-forward block with one of `megatron_ru.ops.activation.ACTIVATIONS`."""
        return with_activation(activation)

    def fp8_linears(self) -> dict[type, type]:
        """Megatron's linears, and those that multiply in fp8 in their place."""
        return {ColumnParallelLinear: Fp8ColumnParallelLinear, RowParallelLinear: Fp8RowParallelLinear}


def layer_spec(options: Any, architecture: Architecture | None, provider: SpecProvider | None = None) -> ModuleSpec:
    """The `ModuleSpec` of one transformer layer.

    `options` carries Megatron's `num_experts`, `moe_grouped_gemm`, `qk_layernorm`, `multi_latent_attention`,
    `normalization`, `swiglu` (the parsed arguments do); `architecture` is the variant, or None for a model that
    Megatron's own arguments describe completely.
    """
    provider = provider or SpecProvider()
    spec = _megatron_local_spec(options)
    layer = spec.submodules
    layer.input_layernorm = _exchange_norm(layer.input_layernorm, provider)
    layer.pre_mlp_layernorm = _exchange_norm(layer.pre_mlp_layernorm, provider)
    attention = layer.self_attention
    if attention.module is SelfAttention:
        attention.module = provider.self_attention()
    attention.submodules.core_attention = provider.core_attention()
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if hasattr(attention.submodules, name):
            setattr(attention.submodules, name, _exchange_norm(getattr(attention.submodules, name), provider))
    if getattr(options, "ru_fp8", None):
        for submodules in (attention.submodules, _submodules_of(layer.mlp)):
            _exchange_linears(submodules, provider.fp8_linears())

    if architecture is None:
        if getattr(options, "swiglu", False):
            layer.mlp = _exchange_mlp(layer.mlp, provider.feed_forward("swiglu"))
        return spec

    layer.mlp = _exchange_mlp(layer.mlp, provider.feed_forward(architecture.activation))
    if architecture.positions == "sinusoidal_every_layer":
        attention.module = SelfAttentionWithPositions
    if architecture.norm_placement == "post":
        spec.module = PostNormTransformerLayer
        layer.input_layernorm = IdentityOp
        layer.pre_mlp_layernorm = IdentityOp
    # Megatron saves the norms under the names TransformerEngine's fused layers would give them; that map fits any
    # checkpoint of either kind, so it stays.
    return spec


def _megatron_local_spec(options: Any) -> ModuleSpec:
    """Megatron's spec without TransformerEngine, given the arguments that this version of it takes."""
    wanted = {
        "num_experts": getattr(options, "num_experts", None),
        "moe_grouped_gemm": getattr(options, "moe_grouped_gemm", False),
        "qk_layernorm": getattr(options, "qk_layernorm", False),
        "multi_latent_attention": getattr(options, "multi_latent_attention", False),
        # RMSNorm keeps Megatron from asking Apex for a fused LayerNorm; the norms are exchanged anyway.
        "normalization": "RMSNorm",
        "qk_l2_norm": getattr(options, "qk_l2_norm", False),
    }
    accepted = inspect.signature(get_gpt_layer_local_spec).parameters
    return get_gpt_layer_local_spec(**{name: value for name, value in wanted.items() if name in accepted})


def _exchange_norm(norm: Any, provider: SpecProvider) -> Any:
    """Our norm in place of Megatron's; places without a norm, and L2 norms, stay as they are."""
    if norm is IdentityOp or getattr(norm, "__name__", "") == "L2Norm":
        return norm
    return provider.norm()


def _exchange_linears(submodules: Any, replacements: dict[type, type]) -> None:
    """Replaces linears among the fields; experts hold other classes and stay as they are."""
    for field in dataclasses.fields(submodules) if dataclasses.is_dataclass(submodules) else ():
        linear = getattr(submodules, field.name)
        if isinstance(linear, type) and linear in replacements:
            setattr(submodules, field.name, replacements[linear])


def _submodules_of(mlp: Any) -> Any:
    """What a ModuleSpec, or the partial of a classmethod, will build an MLP from."""
    if isinstance(mlp, functools.partial):
        return next((value for value in (*mlp.args, *mlp.keywords.values()) if dataclasses.is_dataclass(value)), None)
    return getattr(mlp, "submodules", None)


def _exchange_mlp(mlp: Any, replacement: type[MLP]) -> Any:
    """`mlp` built from `replacement`. Megatron names the class in a ModuleSpec up to 0.18 and in a partial of its
    classmethod since; a mixture of experts holds other classes and stays as it is."""
    if isinstance(mlp, ModuleSpec):
        return ModuleSpec(replacement, mlp.params, mlp.submodules) if mlp.module is MLP else mlp
    if isinstance(mlp, functools.partial):
        method = mlp.func
        if getattr(method, "__self__", None) is MLP:
            return functools.partial(getattr(replacement, method.__name__), *mlp.args, **mlp.keywords)
        return mlp
    from megatron.core.package_info import __version__

    raise UserError(
        f"the local layer spec of megatron-core {__version__} describes its MLP with a {type(mlp).__name__}, expected "
        "a ModuleSpec or a functools.partial; use a version of megatron-core that docs/en/versions.md lists"
    )
