"""Causal attention that never materialises the scores on a GPU."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# cuDNN's kernel reaches about twice the speed of the flash kernel that torch carries on Hopper; the maths kernel,
# which writes the scores, is left out so that a shape nobody supports is an error instead of an out-of-memory.
_GPU_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention output [sequence, batch, heads, head_dim] in the dtype of `query`.

    query: [sequence, batch, heads, head_dim]; key, value: [sequence, batch, kv_heads, head_dim], where kv_heads
    divides heads. mask: None for causal attention, or bool, broadcastable to [batch, 1, sequence, sequence],
    True where a query may NOT look (Megatron's convention). `scale` defaults to 1/sqrt(head_dim).
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    kernels = sdpa_kernel(_GPU_KERNELS, set_priority=True) if query.is_cuda else nullcontext()
    with kernels:
        out = scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if mask is None else ~mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )  # fmt: skip
    return out.permute(2, 0, 1, 3)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The same by the formula, in float64, for tests. Source: Vaswani et al., 2017, equation 1."""
    q, k, v = (tensor.double().permute(1, 2, 0, 3) for tensor in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3)
