"""Post-norm: the norm after the residual sum, as in the original transformer and in GPT-1."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ru.models.norms import Norm


class PostNormTransformerLayer(TransformerLayer):
    """Megatron's layer as norm(x + attention(x)), then norm(x + mlp(x)); the spec leaves its pre-norms empty."""

    def __init__(self, config: Any, *arguments: Any, **keywords: Any):
        super().__init__(config, *arguments, **keywords)
        self.self_attn_bda = _NormAfter(self.self_attn_bda, self.config)
        self.mlp_bda = _NormAfter(self.mlp_bda, self.config)


class _NormAfter(nn.Module):
    """A bias-dropout-add factory whose result goes through a norm."""

    def __init__(self, bias_dropout_add: Callable[..., Any], config: Any):
        super().__init__()
        self._bias_dropout_add = bias_dropout_add
        self.norm = Norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
        """Megatron's `(output with bias, residual, dropout) -> hidden states`, normed."""
        add = self._bias_dropout_add(training, fused)
        return lambda output_with_bias, residual, dropout: self.norm(add(output_with_bias, residual, dropout))
