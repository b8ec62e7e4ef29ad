"""Cross entropy in plain torch: the whole, its parts between which ranks talk, and the formula in float64."""

from typing import Any

import torch
from torch import Tensor


def cross_entropy_plain(
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
    """`cross_entropy.cross_entropy` in plain torch, differentiable; the last settings save memory traffic there and
    ask for nothing here."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted, inside, index = _places(target, ignore_index, 0, logits.shape[-1], logits.shape[-1])
    # What does not count has no gradient, whatever stands there.
    wide = wide.masked_fill(~counted.unsqueeze(-1), 0.0)
    lse = wide.logsumexp(-1)
    picked = wide.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * (lse - picked)
    if label_smoothing:
        losses = losses + label_smoothing * (lse - wide.mean(-1))
    if z_loss:
        losses = losses + z_loss * lse.square()
    # A factor, and no choice between two values: the gradient of the row becomes NaN too.
    losses = losses.where(counted, 0.0) * torch.where(inside | ~counted, 1.0, float("nan"))
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "none",
    **_: Any,
) -> Tensor:
    """The same by the formula, in float64, for tests: -Σ q log p with q the smoothed target."""
    counted = target != ignore_index
    wide = logits.double().masked_fill(~counted.unsqueeze(-1), 0.0)
    vocab = wide.shape[-1]
    inside = (target >= 0) & (target < vocab)
    one_hot = torch.nn.functional.one_hot(torch.where(inside, target, 0).long(), vocab).bool()
    largest = wide.detach().max(-1, keepdim=True).values
    lse = ((wide - largest).exp().sum(-1, keepdim=True)).log() + largest
    log_p = wide - lse
    # A chance of zero times its infinite logarithm is left out of the sum, unless it is the target.
    losses = -(1 - label_smoothing) * torch.where(one_hot, log_p, 0.0).sum(-1)
    if label_smoothing:
        losses = losses - label_smoothing * log_p.mean(-1)
    losses = losses + z_loss * lse.squeeze(-1) ** 2
    losses = torch.where(counted, losses, 0.0) * torch.where(inside | ~counted, 1.0, float("nan"))
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def statistics_plain(logits: Tensor, target: Tensor, first_column: int, smoothing: bool) -> Tensor:
    """[rows, 4] in fp32 at least, of the columns held here: max, sum of exp(x - max), the target's logit or 0 where
    it is elsewhere, and the sum of logits with `smoothing`, else 0."""
    wide, ids = _rows(logits), target.reshape(-1)
    largest = wide.max(-1).values
    # A row of -inf alone has no largest number to subtract.
    anchor = torch.where(largest == float("-inf"), torch.zeros_like(largest), largest)
    exponentials = (wide - anchor.unsqueeze(-1)).exp().sum(-1)
    column = ids - first_column
    here = (column >= 0) & (column < wide.shape[-1])
    picked = wide.gather(-1, torch.where(here, column, 0).long().unsqueeze(-1)).squeeze(-1)
    total = wide.sum(-1) if smoothing else torch.zeros_like(largest)
    return torch.stack((largest, exponentials, torch.where(here, picked, 0.0), total), dim=-1)


def merge_plain(
    statistics: Tensor, target: Tensor, vocab_total: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(losses [...], lse [rows]) of the statistics [parts, rows, 4] of all ranks."""
    largest, exponentials, picked, total = statistics.unbind(-1)
    overall = largest.max(0).values
    anchor = torch.where(overall == float("-inf"), torch.zeros_like(overall), overall)
    weights = torch.where(largest == float("-inf"), torch.zeros_like(largest), (largest - anchor).exp())
    lse = anchor + (exponentials * weights).sum(0).log()
    losses = (1 - label_smoothing) * (lse - picked.sum(0))
    if label_smoothing:
        losses = losses + label_smoothing * (lse - total.sum(0) / vocab_total)
    losses = losses + z_loss * lse.square()
    counted, inside, _ = _places(target.reshape(-1), ignore_index, 0, vocab_total, vocab_total)
    losses = torch.where(inside, losses, torch.full_like(losses, float("nan")))
    losses = torch.where(counted, losses, torch.zeros_like(losses))
    return losses.reshape(target.shape), lse


def backward_plain(
    loss_gradient: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    first_column: int,
    vocab_total: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of the columns held here, in the dtype and shape of the logits."""
    wide, ids = _rows(logits), target.reshape(-1)
    gradient = (wide - lse.unsqueeze(-1)).exp()
    if z_loss:
        gradient *= (1 + 2 * z_loss * lse).unsqueeze(-1)
    gradient -= label_smoothing / vocab_total
    counted, inside, index = _places(ids, ignore_index, first_column, wide.shape[-1], vocab_total)
    here = (ids >= first_column) & (ids < first_column + wide.shape[-1])
    gradient.scatter_add_(-1, index.unsqueeze(-1), ((label_smoothing - 1) * here.to(wide.dtype)).unsqueeze(-1))
    factor = loss_gradient.to(wide.dtype).expand(target.shape).reshape(-1)
    factor = torch.where(inside, factor, torch.full_like(factor, float("nan")))
    gradient = torch.where(counted.unsqueeze(-1), gradient * factor.unsqueeze(-1), torch.zeros_like(gradient))
    return gradient.to(logits.dtype).reshape(logits.shape)


def gradient_plain_(
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The losses [...]; the logits become their gradient times `factor`."""
    vocab = logits.shape[-1]
    statistics = statistics_plain(logits, target, 0, label_smoothing != 0.0)
    losses, lse = merge_plain(statistics.unsqueeze(0), target, vocab, ignore_index, label_smoothing, z_loss)
    if factor is None:
        factor = torch.ones((), dtype=lse.dtype, device=lse.device)
    logits.copy_(backward_plain(factor, logits, target, lse, 0, vocab, ignore_index, label_smoothing, z_loss))
    return losses


def rescale_plain_(gradient: Tensor, factor: Tensor, written: Tensor | None) -> None:
    """Multiplies the rows of `gradient` with factor / written, in fp32 at least; equal factors leave the bits."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    ratio = factor.to(wide) if written is None else factor.to(wide) / written.to(wide)
    if written is not None:
        ratio = torch.where(factor == written, torch.ones_like(ratio), ratio)
    rows = gradient.shape[:-1]
    ratio = ratio if ratio.numel() == 1 else ratio.reshape(rows).unsqueeze(-1)
    gradient.copy_(gradient.to(wide) * ratio)


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))


def _places(
    target: Tensor, ignore_index: int, first_column: int, columns: int, vocab_total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(target counts, target is in the vocabulary, its column here or 0), each [...] of `target`."""
    column = target - first_column
    here = (column >= 0) & (column < columns)
    return target != ignore_index, (target >= 0) & (target < vocab_total), torch.where(here, column, 0).long()
