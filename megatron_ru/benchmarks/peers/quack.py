"""QuACK: kernels in the CuTe DSL."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.peer import Peer, Prepared, UnsupportedError, leaves_of, only_default, register


def _rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Prepared:
    import quack

    offset = 1.0 if zero_centered else 0.0
    return Prepared(
        run=lambda: quack.rmsnorm(x, weight, eps=eps, weight_offset=offset),
        leaves=leaves_of(x, weight),
    )


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Prepared:
    import quack

    offset = 1.0 if zero_centered else 0.0

    def run() -> Any:
        return quack.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True, weight_offset=offset)

    return Prepared(run=run, leaves=leaves_of(x, residual, weight))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Prepared:
    only_default(zero_centered=zero_centered)
    # Its parameters are fp32.
    wide_weight = weight.detach().float().requires_grad_()
    wide_bias = None if bias is None else bias.detach().float().requires_grad_()
    return Prepared(
        run=lambda: _LayerNorm.apply(x, wide_weight, wide_bias, eps), leaves=leaves_of(x, wide_weight, wide_bias)
    )


class _LayerNorm(torch.autograd.Function):
    """Its two functions, which come without autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        from quack.rmsnorm import layernorm_fwd

        out, rstd, mean = layernorm_fwd(x, weight, bias, eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, weight, rstd, mean)
        ctx.has_bias = bias is not None
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from quack.rmsnorm import layernorm_bwd

        x, weight, rstd, mean = ctx.saved_tensors
        return (*layernorm_bwd(x, weight, gradients[0], rstd, mean, ctx.has_bias), None)


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
    from quack.rotary import apply_rotary_emb

    only_default(positions=positions, offset=offset, inverse=inverse)
    if k is None or q.dim() != 4:
        raise UnsupportedError("is asked for q and k of [batch, sequence, heads, head_dim]")
    leaves = tuple(_batch_first(x.detach()).contiguous().requires_grad_() for x in (q, k))
    return Prepared(
        run=lambda: tuple(apply_rotary_emb(leaf, cos, sin, interleaved=interleaved) for leaf in leaves),
        leaves=leaves,
        outputs_to_op=_batch_second,
        gradients_to_op=_batch_second,
        upstream_from_op=lambda upstream: tuple(_batch_first(one).contiguous() for one in upstream),
    )


def _rope_packed(
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
    """q, k and v in one tensor, q and k turned where they lie in one launch."""
    from quack.rotary import apply_rotary_emb_qkv_

    only_default(positions=positions, offset=offset, inverse=inverse)
    if k is None or q.dim() != 4:
        raise UnsupportedError("is asked for q, k and v of [batch, sequence, heads, head_dim]")
    heads, kv_heads = q.shape[2], k.shape[2]

    def packed(*pair: Tensor) -> Tensor:
        front = torch.cat(tuple(_batch_first(x.detach()) for x in pair), dim=2)
        return torch.cat((front, torch.zeros_like(front[:, :, :kv_heads])), dim=2)

    def apart(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _batch_second(tensors[0].split((heads, kv_heads, kv_heads), dim=2)[:2])

    qkv = packed(q, k).requires_grad_()
    return Prepared(
        run=lambda: apply_rotary_emb_qkv_(qkv, cos, sin, interleaved=interleaved, num_heads_q=heads),
        leaves=(qkv,),
        outputs_to_op=apart,
        gradients_to_op=apart,
        upstream_from_op=lambda upstream: (packed(*upstream),),
    )


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str = "none",
    **_: Any,
) -> Prepared:
    import quack

    only_default(label_smoothing=label_smoothing, z_loss=z_loss)
    return Prepared(
        run=lambda: quack.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction),
        leaves=(logits,),
    )


def _cross_entropy_one_pass(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    **_: Any,
) -> Prepared:
    """Its forward that writes a gradient too, as its linear cross entropy uses it: that of the sum, whatever the
    reduction; whoever calls it has to scale it, which is not timed here."""
    only_default(label_smoothing=label_smoothing, z_loss=z_loss)
    if reduction != "mean":
        raise UnsupportedError(f"is asked for a mean, not {reduction}")
    return Prepared(
        run=lambda: _OnePass.apply(logits, target, ignore_index).mean(),
        leaves=(logits,),
        gradients_to_op=lambda gradients: tuple(one / target.numel() for one in gradients),
    )


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        from quack.cross_entropy import cross_entropy_fwd

        losses, gradient = cross_entropy_fwd(logits, target, ignore_index=ignore_index, return_dx=True)
        ctx.gradient = gradient
        return losses  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None, None


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
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    only_default(bias=bias, token_weights=token_weights, label_smoothing=label_smoothing, z_loss=z_loss)

    def run() -> Any:
        # Untuned: its tuner takes minutes.
        return chunked_linear_cross_entropy(x, weight, target, ignore_index=ignore_index, tuned=False)

    return Prepared(run=run, leaves=leaves_of(x, weight))


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _batch_second(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(0, 1) for tensor in tensors)


register(
    Peer(
        name="quack",
        title="QuACK",
        module="quack",
        distribution="quack-kernels",
        summary="QuACK's functions",
        adapters={
            "rms_norm": {"": _rms_norm},
            "add_rms_norm": {"": _add_rms_norm},
            "layer_norm": {"": _layer_norm},
            "rope": {"": _rope, "q, k, v packed, in place": _rope_packed},
            "cross_entropy": {"": _cross_entropy, "one pass, gradient not scaled": _cross_entropy_one_pass},
            "vocab_parallel_cross_entropy": {"": lambda group, **arguments: _cross_entropy(**arguments)},
            "linear_cross_entropy": {"": _linear_cross_entropy},
        },
    )
)
