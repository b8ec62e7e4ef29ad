"""The output layer and cross entropy together: the logits of all tokens are never held at once."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.backend import switch
from megatron_ru.ops.cross_entropy import cross_entropy, gradient_over_logits_, rescale_, vocab_parallel_cross_entropy
from megatron_ru.ops.cross_entropy_plain import cross_entropy_plain, cross_entropy_reference
from megatron_ru.ops.op import BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register

SWITCH = switch("linear_cross_entropy")

# Large enough that a matrix product runs at full speed, small beside the weights' gradient of a large vocabulary.
_CHUNK_BYTES = 350_000_000
# Rows of a chunk are a multiple of this, which every tile of a matrix product divides.
_ROWS_STEP = 128


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    expected_gradient: Tensor | None = None,
    rows_per_chunk: int | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(loss, losses of the tokens) of logits = x · weightᵀ + bias: a scalar, and [...] of `target`, fp32 (fp64 beside
    fp64).

    x: [..., hidden]; weight: [vocab, hidden] in the dtype of x, bias: [vocab]; target: [...] ids. The loss is the
    sum of losses times `token_weights` [...], by default the mean over tokens whose target is not `ignore_index`. The
    losses of the tokens have no gradient of their own. The other settings are those of `cross_entropy`.

    The forward goes through chunks of rows: logits, their gradient over them, and from it at once the gradients of x
    and weight, so that a backward has only to hand them out, once. Extra memory is one chunk of logits (350 MB, or
    `rows_per_chunk` rows) beside the gradients. The weight's gradient is summed over chunks in its own dtype.
    `expected_gradient` is what the loss will be multiplied with in the backward, such as a loss scale, without which
    the gradients of fp16 logits may vanish; another factor is put right in the backward.
    With `group`, weight and bias are this rank's equal share of the vocabulary, and x is the same on all ranks; its
    gradient is summed over them in the backward.
    """
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise UserError(
            f"the weight has sizes {list(weight.shape)} beside x of {list(x.shape)}: "
            f"expected [vocab, {x.shape[-1]}], the last size of x"
        )
    if not _takes(x, weight, bias):
        return linear_cross_entropy_plain(
            x, weight, target, bias=bias, token_weights=token_weights, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, group=group,
        )  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    if token_weights is None:
        token_weights = (target != ignore_index).sum().to(wide).reciprocal()
    else:
        token_weights = token_weights.to(wide)
    record = torch.is_grad_enabled()
    rows = rows_per_chunk or _default_rows(target.numel(), weight)
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return]
        x, weight, bias, target, token_weights, expected_gradient, ignore_index, label_smoothing, z_loss, rows, group,
        record,
    )  # fmt: skip


def linear_cross_entropy_plain(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    expected_gradient: Tensor | None = None,
    rows_per_chunk: int | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The same with all logits at once; how memory is saved asks for nothing here."""
    settings: dict[str, Any] = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
    }  # fmt: skip
    if group is None:
        losses = cross_entropy_plain(torch.nn.functional.linear(x, weight, bias), target, **settings)
    else:
        logits = torch.nn.functional.linear(_SumOfGradients.apply(x, group), weight, bias)
        losses = vocab_parallel_cross_entropy(logits, target, group, **settings)
    return _weighted(losses, target, token_weights, ignore_index), losses.detach()


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The same by the formulas, in float64, for tests."""
    logits = x.double() @ weight.double().t()
    logits = logits if bias is None else logits + bias.double()
    losses = cross_entropy_reference(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )
    return _weighted(losses, target, token_weights, ignore_index), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward has made the gradients when it is done; the backward puts their factor right where it must."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        token_weights: Tensor,
        expected: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        rows_per_chunk: int,
        group: Any,
        record: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, ids = x.reshape(-1, x.shape[-1]), target.reshape(-1)
        wants_x, wants_weight, wants_bias = (record and wanted for wanted in ctx.needs_input_grad[:3])
        wanted = wants_x or wants_weight or wants_bias
        dx = torch.empty_like(rows) if wants_x else None
        dweight = torch.zeros_like(weight) if wants_weight and rows.shape[0] == 0 else None
        # Summed over chunks in fp32: it is one row of the weight's size.
        dbias = torch.zeros_like(bias, dtype=token_weights.dtype) if wants_bias and bias is not None else None
        losses = torch.empty(ids.shape, dtype=token_weights.dtype, device=x.device)
        each = token_weights.reshape(-1) if token_weights.numel() == ids.numel() else token_weights
        factors = each if expected is None else each * expected
        chunk = rows.new_empty(min(rows_per_chunk, rows.shape[0]), weight.shape[0])
        for first in range(0, rows.shape[0], rows_per_chunk):
            part = slice(first, min(first + rows_per_chunk, rows.shape[0]))
            logits = chunk[: part.stop - part.start]
            torch.mm(rows[part], weight.t(), out=logits)
            if bias is not None:
                logits += bias
            if not wanted:
                losses[part] = _losses(logits, ids[part], group, ignore_index, label_smoothing, z_loss)
                continue
            factor = factors[part] if factors.dim() else factors
            losses[part] = gradient_over_logits_(
                logits, ids[part], factor, group, ignore_index, label_smoothing, z_loss
            )
            if dx is not None:
                torch.mm(logits, weight, out=dx[part])
            if wants_weight:
                if dweight is None:
                    dweight = torch.mm(logits.t(), rows[part])
                else:
                    dweight.addmm_(logits.t(), rows[part])
            if dbias is not None:
                dbias += logits.sum(0, dtype=dbias.dtype)
        ctx.save_for_backward(dx, dweight, None if dbias is None or bias is None else dbias.to(bias.dtype), expected)
        ctx.group = group
        ctx.x_shape = x.shape
        losses = losses.reshape(target.shape)
        ctx.mark_non_differentiable(losses)
        # A mean over nothing is no number, as torch has it.
        return losses.sum() * each if each.dim() == 0 else (losses.reshape(-1) * each).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias, expected = ctx.saved_tensors
        given = [None if gradient is None else gradient.detach() for gradient in (dx, dweight, dbias)]
        if given[0] is not None and ctx.group is not None:
            torch.distributed.all_reduce(given[0], group=ctx.group)
        for gradient in given:
            if gradient is not None:
                rescale_(gradient if gradient.dim() == 2 else gradient.unsqueeze(0), gradients[0], expected)
        dx, dweight, dbias = given
        return (
            None if dx is None else dx.view(ctx.x_shape), dweight, dbias,
            None, None, None, None, None, None, None, None, None,
        )  # fmt: skip


class _SumOfGradients(torch.autograd.Function):
    """Identity, whose gradient is summed over the group: each rank knows the part of its own columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not SWITCH.takes(x):
        SWITCH.fell_back(x)
        return False
    if weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        SWITCH.fell_back(x, "x, weight and bias differ in dtype")
        return False
    return True


def _default_rows(rows: int, weight: Tensor) -> int:
    """Equal chunks of at most 350 MB of logits."""
    most = max(1, _CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    chunks = -(-rows // most)
    if chunks <= 1:
        return max(1, rows)
    return -(-rows // (chunks * _ROWS_STEP)) * _ROWS_STEP


def _losses(
    logits: Tensor, target: Tensor, group: Any, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    settings: dict[str, Any] = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
    }  # fmt: skip
    if group is None:
        return cross_entropy(logits, target, **settings)
    return vocab_parallel_cross_entropy(logits, target, group, **settings)


def _weighted(losses: Tensor, target: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    if token_weights is None:
        return losses.sum() / (target != ignore_index).sum()
    return (losses * token_weights).sum()


def _sample(
    label: str,
    rows: tuple[int, ...],
    hidden: int,
    vocab: int,
    *,
    bias: bool = False,
    ignored: tuple[int, ...] = (),
    weighted: bool = False,
    **keywords: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        x = random_tensor(*rows, hidden, device=device, dtype=dtype)
        weight = random_tensor(vocab, hidden, device=device, dtype=dtype, seed=1, size=hidden**-0.5)
        count = torch.Size(rows).numel()
        target = torch.arange(count).mul_(7919).remainder_(vocab)
        for place in ignored:
            target[place] = -100
        settings = dict(keywords)
        if bias:
            settings["bias"] = random_tensor(vocab, device=device, dtype=dtype, seed=2, size=0.3)
        if weighted:
            settings["token_weights"] = torch.linspace(0, 1, count, device=device).reshape(rows)
        return Call(arguments=(x, weight, target.reshape(rows).to(device)), keywords=settings)

    return Sample(label=label, make=make)


def _case(rows: int, hidden: int, vocab: int) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        x = random_tensor(rows, hidden, device=device, dtype=dtype)
        weight = random_tensor(vocab, hidden, device=device, dtype=dtype, seed=1, size=hidden**-0.5)
        return Call(arguments=(x, weight, torch.arange(rows, device=device).mul_(7919).remainder_(vocab)))

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        # x and weight, and their gradients, each once.
        return 2 * (rows + vocab) * hidden * dtype.itemsize, 0

    return BenchmarkCase(
        label=f"{rows}x{hidden}x{vocab}", make=make, bytes_moved=bytes_moved, flops=6 * rows * hidden * vocab
    )


register(
    Op(
        name="linear_cross_entropy",
        switch="linear_cross_entropy",
        summary="output layer and cross entropy without the logits",
        function=linear_cross_entropy,
        plain=linear_cross_entropy_plain,
        reference=linear_cross_entropy_reference,
        samples=(
            _sample("one token", (1,), 8, 5),
            _sample("odd", (5, 3), 17, 37),
            _sample("odd, in chunks", (5, 3), 17, 37, rows_per_chunk=4),
            _sample("chunk of one row left over", (9,), 33, 70, rows_per_chunk=2, label_smoothing=0.1, z_loss=1e-3),
            _sample("bias", (7,), 16, 30, bias=True, rows_per_chunk=3),
            _sample("ignored targets", (4, 4), 16, 30, ignored=(0, 5, 15), rows_per_chunk=5),
            _sample("weights of tokens", (4, 4), 16, 30, weighted=True, rows_per_chunk=6),
        ),
        cases=(_case(8192, 4096, 40000), _case(8192, 4096, 128256)),
        tolerance=Tolerance(
            ulps=1, wide=64, rough=2, reason="the logits are rounded to the dtype, half an epsilon of the largest"
        ),
        gradient_tolerance=Tolerance(
            ulps=1, wide=64, rough=6, reason="logits, their gradient and each chunk's sum are rounded to the dtype"
        ),
        plain_tolerance=Tolerance(
            ulps=1, wide=64, rough=6, reason="logits and their gradient are rounded to the dtype"
        ),
        torch_ops=(
            "cross_entropy_gradient_", "cross_entropy_statistics", "cross_entropy_merge", "cross_entropy_backward_",
            "cross_entropy_rescale_",
        ),
    )
)  # fmt: skip
