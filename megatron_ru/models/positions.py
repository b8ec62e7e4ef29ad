"""Sine and cosine positions: added once to the embeddings, or before every attention."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_ru.ops.sinusoidal import sinusoidal_table


class SinusoidalPositions(nn.Module):
    """Looks positions up in a fixed table divided by √hidden, in place of Megatron's learned position embedding.

    The source multiplies the word embeddings by √hidden before it adds the table (Vaswani et al., 2017, section 3.4):
    without that the table, of size 0.7, drowns embeddings drawn with a deviation of 0.02 and little is learned.
    Dividing the table gives the two the same ratio and leaves the embeddings, which may be tied to the output, alone.
    """

    def __init__(
        self, length: int, hidden: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        # Not persistent: the table follows from its size, a checkpoint need not carry it.
        table = sinusoidal_table(length, hidden, torch.float64) * hidden**-0.5
        self.register_buffer("table", table.to(device, dtype), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Positions [batch, sequence, hidden] for position_ids [batch, sequence]."""
        return nn.functional.embedding(position_ids, self.table)


class SelfAttentionWithPositions(SelfAttention):
    """Self-attention that adds sine and cosine positions to its input, at every layer."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """As Megatron's; hidden_states [sequence, batch, hidden], or this rank's part of the sequence when
        sequence parallelism is on."""
        length, _, hidden = hidden_states.shape
        first, total = 0, length
        if self.config.sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            first, total = parallel_state.get_tensor_model_parallel_rank() * length, size * length
        table = self._table(total, hidden, hidden_states)[first : first + length, None]
        return super().forward(hidden_states + table, *arguments, **keywords)

    def _table(self, length: int, hidden: int, like: Tensor) -> Tensor:
        cached = getattr(self, "_cached_table", None)
        if cached is None or cached.shape[0] < length or cached.dtype != like.dtype or cached.device != like.device:
            cached = sinusoidal_table(length, hidden, like.dtype).to(like.device)
            self._cached_table = cached
        return cached
