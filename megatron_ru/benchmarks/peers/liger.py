"""Liger-Kernel: Triton kernels for training."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.peer import Peer, Prepared, UnsupportedError, leaves_of, only_default, register


def _rms_norm(in_place: bool, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Prepared:
    from liger_kernel.ops import LigerRMSNormFunction

    offset = 1.0 if zero_centered else 0.0

    def run() -> Any:
        return LigerRMSNormFunction.apply(x, weight, eps, offset, "llama", in_place)

    return Prepared(run=run, leaves=leaves_of(x, weight))


def _add_rms_norm(
    in_place: bool, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> Prepared:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    offset = 1.0 if zero_centered else 0.0

    def run() -> Any:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, "llama", in_place)

    return Prepared(run=run, leaves=leaves_of(x, residual, weight))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Prepared:
    from liger_kernel.ops import LigerLayerNormFunction

    only_default(zero_centered=zero_centered)
    if bias is None:
        raise UnsupportedError("has no LayerNorm without a bias")
    return Prepared(run=lambda: LigerLayerNormFunction.apply(x, weight, bias, eps), leaves=leaves_of(x, weight, bias))


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
    from liger_kernel.ops import LigerRopeFunction

    only_default(positions=positions, offset=offset, interleaved=interleaved, inverse=inverse)
    if k is None or q.dim() != 4:
        raise UnsupportedError("takes q and k of [batch, heads, sequence, head_dim]")

    # Memory in the order of batch, sequence, head, as its kernel reads it; it turns q and k in place.
    def as_it_likes(x: Tensor) -> Tensor:
        return x.permute(1, 0, 2, 3).contiguous().transpose(1, 2)

    def back(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.permute(2, 0, 1, 3) for tensor in tensors)

    leaves = tuple(as_it_likes(x.detach()).requires_grad_() for x in (q, k))
    wide_cos, wide_sin = (torch.cat((table, table), dim=-1)[None] for table in (cos, sin))
    return Prepared(
        run=lambda: LigerRopeFunction.apply(*leaves, wide_cos, wide_sin),
        leaves=leaves,
        outputs_to_op=back,
        gradients_to_op=back,
        upstream_from_op=lambda upstream: tuple(as_it_likes(one) for one in upstream),
    )


def _glu(gate: Tensor, up: Tensor, kind: str) -> Prepared:
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    functions = {"swiglu": LigerSiLUMulFunction, "geglu": LigerGELUMulFunction}
    if kind not in functions:
        raise UnsupportedError(f"has no {kind}")
    # Its GEGLU takes the tanh form of GELU, which is looked at against ours with erf: a bf16 rounding apart.
    return Prepared(run=lambda: functions[kind].apply(gate, up), leaves=leaves_of(gate, up))


def _activation(x: Tensor, bias: Tensor | None, kind: str, in_place_backward: bool) -> Prepared:
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction, LigerGELUMulFunction

    only_default(bias=bias)
    if kind == "swiglu":
        return Prepared(run=lambda: LigerFusedGateUpSiLUMulFunction.apply(x, in_place_backward), leaves=leaves_of(x))
    if kind == "geglu":
        return Prepared(run=lambda: LigerGELUMulFunction.apply(*x.chunk(2, dim=-1)), leaves=leaves_of(x))
    raise UnsupportedError(f"has no {kind}")


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    expected_gradient: Tensor | None,
    reduction: str,
    in_place: bool,
    one_pass: bool | None,
) -> Prepared:
    from liger_kernel.ops import LigerCrossEntropyFunction

    def run() -> Any:
        # Writes the gradient over the logits.
        return LigerCrossEntropyFunction.apply(
            logits, target, None, ignore_index, z_loss, label_smoothing, reduction, None, False, False, False
        )[0]

    return Prepared(run=run, leaves=(logits,))


def _vocab_parallel(
    logits: Tensor,
    target: Tensor,
    group: Any,
    *,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    in_place: bool,
) -> Prepared:
    from liger_kernel.ops import LigerVocabParallelCEFunction

    only_default(z_loss=z_loss)

    def run() -> Any:
        # It takes [sequence, batch, vocab].
        return LigerVocabParallelCEFunction.apply(
            logits.unsqueeze(1), target.unsqueeze(1), group, ignore_index, label_smoothing, "pytorch", "global"
        ).squeeze(1)

    return Prepared(run=run, leaves=(logits,))


def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    **_: Any,
) -> Prepared:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    only_default(token_weights=token_weights)

    def run() -> Any:
        return LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, target, bias, None, ignore_index, z_loss, label_smoothing, "mean"
        )[0]

    return Prepared(run=run, leaves=leaves_of(x, weight, bias))


register(
    Peer(
        name="liger",
        title="Liger",
        module="liger_kernel",
        distribution="liger-kernel",
        summary="Liger-Kernel's functions",
        adapters={
            "rms_norm": {
                "": lambda **arguments: _rms_norm(False, **arguments),
                "in place": lambda **arguments: _rms_norm(True, **arguments),
            },
            "add_rms_norm": {
                "": lambda **arguments: _add_rms_norm(False, **arguments),
                "in place": lambda **arguments: _add_rms_norm(True, **arguments),
            },
            "layer_norm": {"": _layer_norm},
            "rope": {"": _rope},
            "glu": {"": _glu},
            "activation": {"": _activation},
            "cross_entropy": {"": _cross_entropy},
            "vocab_parallel_cross_entropy": {"": _vocab_parallel},
            "linear_cross_entropy": {"": _linear_cross_entropy},
        },
    )
)
