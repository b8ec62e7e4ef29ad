"""Causal attention step by step, as models are written in PyTorch without a fused kernel: to compare with."""

import math

import torch
from torch import Tensor


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """The same as `megatron_ru.ops.attention.attention`, [sequence, batch, heads, head_dim]: with the scores [batch,
    heads, sequence, sequence] in memory, and softmax in fp32."""
    if query.dim() == 5:
        query = query.flatten(2, 3)
    repeats = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    return (weights @ v).permute(2, 0, 1, 3)
