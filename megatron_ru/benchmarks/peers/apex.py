"""NVIDIA Apex, built from source; what PyPI calls apex is another program."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.peer import Peer, Prepared, UnsupportedError, leaves_of, only_default, register


def _rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Prepared:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    only_default(zero_centered=zero_centered)
    shape = (x.shape[-1],)
    return Prepared(run=lambda: fused_rms_norm_affine(x, weight, shape, eps), leaves=leaves_of(x, weight))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Prepared:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    only_default(zero_centered=zero_centered)
    if bias is None:
        raise UnsupportedError("has no LayerNorm without a bias")
    shape = (x.shape[-1],)
    return Prepared(run=lambda: fused_layer_norm_affine(x, weight, bias, shape, eps), leaves=leaves_of(x, weight, bias))


def _rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    in_place: bool,
) -> Prepared:
    from apex.transformer.functional import fused_apply_rotary_pos_emb

    only_default(positions=positions, offset=offset, interleaved=interleaved, inverse=inverse)
    if k is None or q.dim() != 4:
        raise UnsupportedError("is asked for q and k of [sequence, batch, heads, head_dim]")
    # It computes sine and cosine itself.
    angles = torch.atan2(sin.double(), cos.double()).float()
    freqs = torch.cat((angles, angles), dim=-1)[:, None, None]

    def run() -> Any:
        return tuple(fused_apply_rotary_pos_emb(x, freqs) for x in (q, k))

    return Prepared(run=run, leaves=leaves_of(q, k))


register(
    Peer(
        name="apex",
        title="Apex",
        # This part of it is not in the program of PyPI.
        module="apex.normalization",
        distribution="apex",
        summary="Apex's functions",
        adapters={"rms_norm": {"": _rms_norm}, "layer_norm": {"": _layer_norm}, "rope": {"": _rope}},
    )
)
