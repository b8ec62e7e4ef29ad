"""What Megatron's layers recompute, set on layers that are built already.

Megatron's layers read `--recompute-modules` when they are built and keep the answer in switches, which they ask in each
forward pass; the block asks its config in each forward pass how many of its first layers are recomputed whole. So both
can be mixed, and a layer can be measured before it is decided on.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_ru.models.recompute_plan import WHOLE
from megatron_ru.models.residual import relink_residuals

# Not layernorm: megatron-core 0.19 compiles a C++ extension for it in the first backward pass.
_SWITCHES = {
    "core_attn": ("self_attention", "checkpoint_core_attention"),
    "mlp": ("", "recompute_mlp"),
}


def recomputable(layer: nn.Module) -> list[str]:
    """The parts of the layer, by their names in `--recompute-modules`, that can be recomputed by themselves."""
    parts = [part for part, (owner, switch) in _SWITCHES.items() if hasattr(getattr(layer, owner, layer), switch)]
    # With biases Megatron's checkpoint of an mlp gives the bias as a result of its own, whose backward never ends.
    biased = getattr(getattr(layer, "config", None), "add_bias_linear", False)
    return [part for part in parts if not (biased and part == "mlp")]


def recompute_parts(layer: nn.Module, parts: Sequence[str]) -> None:
    """Lets the layer recompute these parts and no others from its next forward pass on."""
    for part in recomputable(layer):
        owner, switch = _SWITCHES[part]
        setattr(getattr(layer, owner, layer), switch, part in parts)


def recompute_layers(block: Any, ways: Sequence[tuple[str, ...]]) -> None:
    """Lets each layer of a `TransformerBlock` go its way of `Plan.ways`; those that are `WHOLE` must come first."""
    whole = sum(way == WHOLE for way in ways)
    assert all(way == WHOLE for way in ways[:whole])
    for layer, way in zip(block.layers, ways, strict=False):
        recompute_parts(layer, () if way == WHOLE else way)
    config = block.config
    config.recompute_granularity = "full" if whole else None
    config.recompute_method = "block" if whole else None
    config.recompute_num_layers = whole or None
    relink_residuals(block)
