"""The feed-forward block of a Megatron layer with any of our activations."""

import copy
from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_ru.ops.activation import activation, is_gated


class FeedForward(MLP):
    """Megatron's MLP whose activation is the op `activation`; the weights keep Megatron's names and layout.

    Subclasses made by `with_activation` set `kind`.
    """

    kind: str

    def __init__(self, config: Any, *arguments: Any, **keywords: Any):
        # The linears take their sizes from the config; the gate is decided by the activation, so the config
        # that they see says the same. A copy, because the layer's own config is shared.
        config = copy.copy(config)
        config.gated_linear_unit = is_gated(self.kind)
        super().__init__(config, *arguments, **keywords)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **keywords: Any) -> Any:
        """(output [sequence, batch, hidden], bias or None) of hidden_states [sequence, batch, hidden]."""
        if per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **keywords)
        intermediate, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(activation(intermediate, bias, self.kind))


def with_activation(kind: str) -> type[FeedForward]:
    """The `FeedForward` class for one activation of `megatron_ru.ops.activation.ACTIVATIONS`."""
    return type(f"FeedForward_{kind}", (FeedForward,), {"kind": kind, "__module__": __name__})
