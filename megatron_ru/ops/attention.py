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

    query: [sequence, batch, heads, head_dim] or, by the key head that they share, [sequence, batch, kv_heads, heads of
    each, head_dim]; key, value: [sequence, batch, kv_heads, head_dim], where kv_heads divides heads. mask: None
    for causal attention, or bool, broadcastable to [batch, 1, sequence, sequence], True where a query may NOT look
    (Megatron's convention). `scale` defaults to 1/sqrt(head_dim). Where keys are more than queries, as behind a cache,
    the queries are the last positions.
    """
    if query.dim() == 5:
        if mask is None and query.shape[0] == key.shape[0] and (not query.is_cuda or _has_grouped_kernel(query, mask)):
            return _by_groups(query, key, value, scale, dropout)
        query = query.flatten(2, 3)
    if mask is None and query.shape[0] != key.shape[0]:
        # Torch's causal attention would take them for the first positions.
        mask = _causal_mask(query, key)
    grouped = query.shape[2] != key.shape[2]
    if grouped and query.is_cuda and not _has_grouped_kernel(query, mask):
        repeats = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
        grouped = False
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    kernels = sdpa_kernel(_GPU_KERNELS, set_priority=True) if query.is_cuda else nullcontext()
    with kernels:
        out = scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if mask is None else ~mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=grouped,
        )  # fmt: skip
    return out.permute(2, 0, 1, 3)


def _by_groups(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Each group of query heads as a sample of its own: what one projection holds then needs no copy, since batch and
    groups lie there as one dimension, while the heads of all groups do not."""
    key, value = (tensor.flatten(1, 2).unsqueeze(2) for tensor in (key, value))
    out = attention(query.flatten(1, 2), key, value, mask=None, scale=scale, dropout=dropout)
    return out.unflatten(1, query.shape[1:3]).flatten(2, 3)


def _has_grouped_kernel(query: Tensor, mask: Tensor | None) -> bool:
    """Whether cuDNN's or the flash kernel takes this, which share a key head among query heads by themselves: half
    precision, Ampere or later, no mask. The memory-efficient kernel takes the rest, with one key head per query head.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and mask is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The same by the formula, in float64, for tests. Source: Vaswani et al., 2017, equation 1."""
    q, k, v = (tensor.double().permute(1, 2, 0, 3) for tensor in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if mask is None:
        mask = _causal_mask(query, key)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3)


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """[queries, keys], True where the key comes after the query; both end at the same position."""
    queries, keys = query.shape[0], key.shape[0]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
