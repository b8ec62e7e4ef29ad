"""Torch's attention for the peers, with the fastest kernel that the GPU has for it."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# cuDNN's kernel is about twice as fast on Hopper as the one that torch takes by itself.
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def fast_kernels(device: str) -> AbstractContextManager[None]:
    """While it is entered, torch's attention tries cuDNN's kernel first; on a CPU nothing changes."""
    return sdpa_kernel(_KERNELS, set_priority=True) if device == "cuda" else nullcontext()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, sequence, head_dim], from keys and values of as many heads or fewer."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
