"""Cross entropy of logits and target ids, on one rank or with the vocabulary spread over several."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.backend import switch
from megatron_ru.ops.cross_entropy_plain import (
    backward_plain,
    cross_entropy_plain,
    cross_entropy_reference,
    gradient_plain_,
    merge_plain,
    rescale_plain_,
    statistics_plain,
)
from megatron_ru.ops.cross_entropy_samples import (
    GRADIENT_TOLERANCE,
    PLAIN_TOLERANCE,
    TOLERANCE,
    cases,
    parallel_cases,
    parallel_samples,
    samples,
)
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import Op, register

SWITCH = switch("cross_entropy")
_fused = operator("cross_entropy")
_fused_mean = operator("cross_entropy_mean")
_fused_gradient_ = operator("cross_entropy_gradient_")
_fused_rescale_ = operator("cross_entropy_rescale_")
_fused_statistics = operator("cross_entropy_statistics")
_fused_merge = operator("cross_entropy_merge")
_fused_backward = operator("cross_entropy_backward")
_fused_backward_ = operator("cross_entropy_backward_")

_REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    expected_gradient: Tensor | None = None,
    reduction: str = "none",
    in_place: bool = False,
    one_pass: bool | None = None,
) -> Tensor:
    """Losses in fp32 (fp64 beside fp64): [...] of `target`, or a scalar with `reduction` "mean" or "sum".

    logits: [..., vocab] in fp32, fp16, bf16 or fp64; target: [...] ids, int64 or int32. With p = softmax(logits),
    lse = log Σ exp(logits) and e = label_smoothing, a loss is (1 - e)(lse - logit of the target) +
    e (lse - mean of the logits) + z_loss · lse². It is 0, without gradient, where the target is `ignore_index`, which
    "mean" does not count either; a target outside the vocabulary gives NaN.

    `one_pass` writes the gradient in the forward, multiplied with what the backward is expected to bring; the backward
    then touches only rows where it brings something else, and can run once. That moves 4 bytes for each bf16 logit,
    where two passes move 6. It is chosen when the factor is known: with a reduction, or with `expected_gradient`, a
    number or one for each row (a loss scale, say). `in_place` writes the gradient over the logits, which must then be
    needed by nobody else.
    Sources: Szegedy et al., 2016, "Rethinking the Inception Architecture", section 7 (label smoothing); Chowdhery et
    al., 2022, "PaLM", section 5 (z-loss).
    """
    fused = SWITCH.takes(logits)
    if not fused:
        SWITCH.fell_back(logits)
    expected = expected_gradient
    share = None
    if reduction != "none":
        if reduction not in _REDUCTIONS:
            raise UserError(f"reduction {reduction!r} is unknown, expected one of {', '.join(_REDUCTIONS)}")
        if reduction == "mean":
            if fused and one_pass is not False and not in_place:
                # The same numbers, with three small kernels instead of eight around the large one.
                return _fused_mean(  # type: ignore[no-any-return]
                    logits, target, expected, ignore_index, label_smoothing, z_loss
                )
            wide = torch.promote_types(logits.dtype, torch.float32)
            share = (target != ignore_index).sum(dtype=wide).reciprocal()
            expected = share if expected is None else expected * share
    if one_pass is None:
        one_pass = reduction != "none" or expected is not None
    if in_place and logits.requires_grad and torch.is_grad_enabled():
        if one_pass:
            losses = _OnePassInPlace.apply(logits, target, expected, ignore_index, label_smoothing, z_loss, fused)
        else:
            losses = _VocabParallel.apply(logits, target, None, label_smoothing, z_loss, ignore_index, True, fused)
    elif fused:
        losses = _fused(logits, target, expected, ignore_index, label_smoothing, z_loss, one_pass)
    else:
        losses = cross_entropy_plain(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
    if reduction == "none":
        return losses  # type: ignore[no-any-return]
    return losses.sum() if share is None else losses.sum() * share  # type: ignore[no-any-return]


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Any,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    in_place: bool = False,
) -> Tensor:
    """Losses in fp32, [...] of `target`, where each rank of `group` holds an equal share of the vocabulary.

    logits: [..., vocab / ranks], the columns of this rank; target: [...] ids over the whole vocabulary, the same on all
    ranks. `group` is a process group, or None for one rank alone. Each rank reads its logits once; one all-gather of
    four numbers per row follows; no rank sees another's logits. `in_place`: the backward writes over the logits, which
    must then be needed by nobody else. The other settings are those of `cross_entropy`.
    """
    fused = SWITCH.takes(logits)
    if fused and group is None and not in_place:
        # The same kernels, reached in half the time.
        return _fused(logits, target, None, ignore_index, label_smoothing, z_loss, False)  # type: ignore[no-any-return]
    if not fused:
        SWITCH.fell_back(logits)
    return _VocabParallel.apply(  # type: ignore[no-any-return]
        logits, target, group, label_smoothing, z_loss, ignore_index, in_place, fused
    )


def gradient_over_logits_(
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    group: Any,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The losses [rows]; the logits [rows, vocab / ranks] become their gradient times `factor`. No graph is made.

    factor: a number or one for each row, None for ones.
    """
    fused = SWITCH.takes(logits)
    if group is None:
        write = _fused_gradient_ if fused else gradient_plain_
        return write(logits, target, factor, ignore_index, label_smoothing, z_loss)  # type: ignore[no-any-return]
    first_column, total = _share(logits, group)
    losses, lse = _losses(logits, target, group, first_column, total, label_smoothing, z_loss, ignore_index, fused)
    if factor is None:
        factor = torch.ones((), dtype=losses.dtype, device=losses.device)
    _write_gradient(
        factor, logits, target, lse, first_column, total, ignore_index, label_smoothing, z_loss, True, fused
    )
    return losses


def rescale_(gradient: Tensor, factor: Tensor, written: Tensor | None) -> None:
    """Multiplies a gradient [rows, columns] that was written with the factor `written` to have `factor` instead.

    Both are a number or one for each row, None for ones. Rows whose factors agree are not touched: nothing is read,
    and the host does not wait.
    """
    (_fused_rescale_ if SWITCH.takes(gradient) else rescale_plain_)(gradient, factor, written)


class _OnePassInPlace(torch.autograd.Function):
    """The forward leaves the gradient where the logits were."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        expected: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        fused: bool,
    ) -> Tensor:
        write = _fused_gradient_ if fused else gradient_plain_
        losses = write(logits, target, expected, ignore_index, label_smoothing, z_loss)
        # Saved after it was written: a change by anybody else, a second backward among them, is noticed by torch.
        ctx.save_for_backward(logits, expected)
        ctx.fused = fused
        return losses  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, expected = ctx.saved_tensors
        gradient = logits.detach()
        (_fused_rescale_ if ctx.fused else rescale_plain_)(gradient, gradients[0], expected)
        return gradient, None, None, None, None, None, None


class _VocabParallel(torch.autograd.Function):
    """Two passes, with the ranks' statistics merged between them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        group: Any,
        label_smoothing: float,
        z_loss: float,
        ignore_index: int,
        in_place: bool,
        fused: bool,
    ) -> Tensor:
        first_column, total = _share(logits, group)
        losses, lse = _losses(logits, target, group, first_column, total, label_smoothing, z_loss, ignore_index, fused)
        ctx.save_for_backward(logits, target, lse)
        ctx.settings = (first_column, total, ignore_index, label_smoothing, z_loss, in_place, fused)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        gradient = _write_gradient(gradients[0], logits.detach(), target, lse, *ctx.settings)
        return gradient, None, None, None, None, None, None, None


def _share(logits: Tensor, group: Any) -> tuple[int, int]:
    """(id of the first column here, size of the whole vocabulary)."""
    columns = logits.shape[-1]
    if group is None:
        return 0, columns
    return columns * torch.distributed.get_rank(group), columns * torch.distributed.get_world_size(group)


def _losses(
    logits: Tensor,
    target: Tensor,
    group: Any,
    first_column: int,
    total: int,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """(losses [...], lse [rows])."""
    take, merge = (_fused_statistics, _fused_merge) if fused else (statistics_plain, merge_plain)
    # [rows, 4]: max, sum of exponentials, logit of the target, sum of logits.
    statistics = take(logits, target, first_column, label_smoothing != 0.0)
    gathered = statistics.unsqueeze(0)
    if group is not None:
        gathered = statistics.new_empty((total // logits.shape[-1], *statistics.shape))
        torch.distributed.all_gather_into_tensor(gathered.view(-1, 4), statistics, group=group)
    return merge(gathered, target, total, ignore_index, label_smoothing, z_loss)  # type: ignore[no-any-return]


def _write_gradient(
    factor: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    first_column: int,
    total: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    in_place: bool,
    fused: bool,
) -> Tensor:
    settings = (first_column, total, ignore_index, label_smoothing, z_loss)
    if not fused:
        gradient = backward_plain(factor, logits, target, lse, *settings)
        return logits.copy_(gradient) if in_place else gradient
    if in_place:
        _fused_backward_(factor, logits, target, lse, *settings)
        return logits
    return _fused_backward(factor, logits, target, lse, *settings)  # type: ignore[no-any-return]


def _parallel_plain(logits: Tensor, target: Tensor, group: Any, *, in_place: bool = False, **keywords: Any) -> Tensor:
    assert group is None
    return cross_entropy_plain(logits, target, **keywords)


def _parallel_reference(
    logits: Tensor, target: Tensor, group: Any, *, in_place: bool = False, **keywords: Any
) -> Tensor:
    assert group is None
    return cross_entropy_reference(logits, target, **keywords)


register(
    Op(
        name="cross_entropy",
        switch="cross_entropy",
        summary="cross entropy on one rank",
        function=cross_entropy,
        plain=cross_entropy_plain,
        reference=cross_entropy_reference,
        samples=samples(),
        cases=cases(),
        tolerance=TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        plain_tolerance=PLAIN_TOLERANCE,
        torch_ops=("cross_entropy", "cross_entropy_mean", "cross_entropy_gradient_", "cross_entropy_rescale_"),
    )
)
register(
    Op(
        name="vocab_parallel_cross_entropy",
        switch="cross_entropy",
        summary="cross entropy over a divided vocabulary",
        function=vocab_parallel_cross_entropy,
        plain=_parallel_plain,
        reference=_parallel_reference,
        samples=parallel_samples(),
        cases=parallel_cases(),
        tolerance=TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        plain_tolerance=PLAIN_TOLERANCE,
        torch_ops=(
            "cross_entropy_statistics", "cross_entropy_merge", "cross_entropy_backward", "cross_entropy_backward_",
        ),
    )
)  # fmt: skip
