"""Sine and cosine position tables."""

import torch
from torch import Tensor


def sinusoidal_table(length: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position table [length, hidden]: even columns sin(p / 10000^(2k/hidden)), odd columns the cosine.

    Computed in fp64 and rounded once. Source: Vaswani et al., 2017, "Attention Is All You Need", section 3.5.
    """
    positions = torch.arange(length, dtype=torch.float64)[:, None]
    pairs = torch.arange((hidden + 1) // 2, dtype=torch.float64)[None, :]
    angles = positions / 10000.0 ** (2 * pairs / hidden)
    table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
    return table[:, :hidden].to(dtype)
