"""The core attention of a Megatron layer, through torch's scaled dot product attention."""

from contextlib import nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.attention import attention


class CoreAttention(MegatronModule):
    """Causal attention over the heads of this tensor-parallel rank; the scores are never in memory on a GPU."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        """Takes what Megatron's attention passes; raises `UserError` for what this attention cannot do."""
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise UserError(
                f"--context-parallel-size {config.context_parallel_size} was given, but this attention works on whole "
                "sequences; use 1, or --transformer-impl transformer_engine with TransformerEngine installed"
            )
        if attention_type != "self":
            raise UserError(f"{attention_type} attention was asked for, this module does self-attention only")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Context [sequence, batch, heads·head_dim] from query [sequence, batch, heads, head_dim] or [sequence, batch,
        kv_heads, heads of each, head_dim] and key, value [sequence, batch, kv_heads, head_dim]; attention_mask None
        means causal, else True hides."""
        if packed_seq_params is not None or attention_bias is not None:
            raise UserError(
                "packed sequences and attention biases are not supported by this attention; drop --sft and "
                "--dataloader-inter-document-masking, or use --transformer-impl transformer_engine"
            )
        dropout = self.dropout if self.training else 0.0
        # Heads are split over ranks, so each rank must drop its own: outside sequence parallelism that needs the
        # tensor-parallel random state, as in Megatron's own attention.
        own_state = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_state else nullcontext():
            context = attention(query, key, value, mask=attention_mask, scale=self.softmax_scale, dropout=dropout)
        return context.reshape(*context.shape[:2], -1)
