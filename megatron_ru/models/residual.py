"""The residual sum and the norm that follows it as one op, across Megatron's layers.

A Megatron layer adds its block's output to the residual stream and hands the sum on; the next norm reads it again. Here
whatever adds also computes the norm that will follow, and lays it beside the sum; that norm, when Megatron calls it,
takes what lies there (`megatron_ru.models.norms.RMSNorm`). Megatron's layer and block run unchanged, and where anything
comes between, as a recomputed layer, the norm finds nothing and computes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megatron_ru.models.norms import RMSNorm


class AddThenNorm:
    """What stands where Megatron's layer has `get_bias_dropout_add`: the sum by way of the norm that will read it."""

    def __init__(self, megatron: Callable[..., Any], norm: RMSNorm):
        self.megatron, self._norm = megatron, norm

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The function (output and bias, residual, dropout) -> sum [sequence, batch, hidden]."""
        plain = self.megatron(training, fused)

        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            if bias is not None or (training and dropout > 0) or output.dtype is not residual.dtype:
                return plain(output_with_bias, residual, dropout)  # type: ignore[no-any-return]
            # Through the module, not its op: Megatron's hooks wait there for a parameter that is still being gathered.
            return self._norm(output, residual)  # type: ignore[no-any-return]

        return add


def link_residuals(block: Any) -> None:
    """Lets each layer of a `TransformerBlock` compute the norm after its attention, and the norm of the next layer or
    of the block's end, with the sum before it. Leaves alone what is not pre-norm with our RMSNorm."""
    layers = list(block.layers)
    # The input of a recomputed layer is a copy that carries nothing: the norm would be computed twice.
    whole = _whole_layers(block.config, len(layers))
    followers = [getattr(layer, "input_layernorm", None) for layer in layers[1:]]
    followers.append(getattr(block, "final_layernorm", None))
    for index, (layer, follower) in enumerate(zip(layers, followers, strict=True)):
        if not _is_pre_norm(layer):
            continue
        layer.self_attn_bda = AddThenNorm(layer.self_attn_bda, layer.pre_mlp_layernorm)
        if index >= whole and isinstance(follower, RMSNorm):
            layer.mlp_bda = AddThenNorm(layer.mlp_bda, follower)


def relink_residuals(block: Any) -> None:
    """Links the layers that are linked anew, after what is recomputed in the block has changed."""
    links = [(layer, name) for layer in block.layers for name in ("self_attn_bda", "mlp_bda")]
    links = [(layer, name) for layer, name in links if isinstance(getattr(layer, name, None), AddThenNorm)]
    for layer, name in links:
        setattr(layer, name, getattr(layer, name).megatron)
    if links:
        link_residuals(block)


def _whole_layers(config: Any, layers: int) -> int:
    """How many layers, from the first on, are recomputed whole."""
    if config.recompute_granularity != "full":
        return 0
    # In fp8 Megatron begins later than at the first.
    later = getattr(config, "fp8", None) or getattr(config, "fp4", None)
    block = getattr(config, "recompute_method", None) == "block" and not later
    return config.recompute_num_layers if block else layers


def _is_pre_norm(layer: nn.Module) -> bool:
    """Whether the layer is a block, a sum, our norm, a block and a sum, with no norm that is recomputed by itself."""
    recomputes = ("recompute_input_layernorm", "recompute_pre_mlp_layernorm")
    return (
        hasattr(layer, "self_attn_bda")
        and hasattr(layer, "mlp_bda")
        and isinstance(getattr(layer, "pre_mlp_layernorm", None), RMSNorm)
        and not any(getattr(layer, name, False) for name in recomputes)
    )
