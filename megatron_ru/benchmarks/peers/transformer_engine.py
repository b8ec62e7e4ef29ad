"""TransformerEngine, version 2: NVIDIA's CUDA kernels."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.peer import Peer, Prepared, UnsupportedError, leaves_of, only_default, register


def _rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Prepared:
    import transformer_engine.pytorch as te

    module = te.RMSNorm(x.shape[-1], eps=eps, zero_centered_gamma=zero_centered, device=x.device, dtype=weight.dtype)
    _fill(module.weight, weight)
    return Prepared(run=lambda: module(x), leaves=leaves_of(x, module.weight))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Prepared:
    import transformer_engine.pytorch as te

    if bias is None:
        raise UnsupportedError("has no LayerNorm without a bias")
    module = te.LayerNorm(x.shape[-1], eps=eps, zero_centered_gamma=zero_centered, device=x.device, dtype=weight.dtype)
    _fill(module.weight, weight)
    _fill(module.bias, bias)
    return Prepared(run=lambda: module(x), leaves=leaves_of(x, module.weight, module.bias))


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
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    only_default(positions=positions, offset=offset, inverse=inverse)
    if k is None or q.dim() != 4:
        raise UnsupportedError("is asked for q and k of [sequence, batch, heads, head_dim]")
    # It computes sine and cosine itself.
    angles = torch.atan2(sin.double(), cos.double()).float()
    twice = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    freqs = twice[:, None, None]

    def run() -> Any:
        return tuple(
            apply_rotary_pos_emb(x, freqs, tensor_format="sbhd", interleaved=interleaved, fused=True) for x in (q, k)
        )

    return Prepared(run=run, leaves=leaves_of(q, k))


def _activation(x: Tensor, bias: Tensor | None, kind: str, in_place_backward: bool) -> Prepared:
    import transformer_engine.pytorch.ops as te_ops

    only_default(bias=bias)
    name = {"swiglu": "SwiGLU", "geglu": "GEGLU", "reglu": "ReGLU", "relu": "ReLU"}.get(kind)
    if name is None:
        raise UnsupportedError(f"has no {kind}")
    module = getattr(te_ops, name)()
    return Prepared(run=lambda: module(x), leaves=leaves_of(x))


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str = "none",
    group: Any = None,
    **_: Any,
) -> Prepared:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    only_default(z_loss=z_loss)
    if reduction == "sum":
        raise UnsupportedError("has no sum")

    def run() -> Any:
        # [sequence, batch, vocab]; it writes the gradient over the logits.
        loss = parallel_cross_entropy(
            logits.unsqueeze(1), target.unsqueeze(1), label_smoothing, reduction == "mean", group, ignore_index
        )
        return loss if reduction == "mean" else loss.squeeze(1)

    return Prepared(run=run, leaves=(logits,))


def _fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


register(
    Peer(
        name="te",
        title="TransformerEngine",
        module="transformer_engine.pytorch",
        distribution="transformer-engine",
        summary="TransformerEngine's modules",
        adapters={
            "rms_norm": {"": _rms_norm},
            "layer_norm": {"": _layer_norm},
            "rope": {"": _rope},
            "activation": {"": _activation},
            "cross_entropy": {"": _cross_entropy},
            "vocab_parallel_cross_entropy": {"": _cross_entropy},
        },
    )
)
