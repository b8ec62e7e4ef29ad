"""The gradient of an embedding, added to the buffer that keeps it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register

SWITCH = switch("embedding")
_fused = operator("embedding_gradient_")


def embedding(ids: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Rows of `weight` [ids' shape, hidden]; backward adds their gradient to `kept` and gives `weight` an empty one.

    ids: int64, each a row of weight; weight: [rows, hidden]; kept: fp32 of weight's shape, contiguous. Torch's own
    backward fills a matrix of weight's shape, all of which is then added; here only rows that were looked up are
    touched, in an order that does not change from run to run.
    """
    return _Embedding.apply(ids, weight, kept)  # type: ignore[no-any-return]


@torch.no_grad()
def add_embedding_gradient(kept: Tensor, gradient: Tensor, ids: Tensor) -> None:
    """Adds each row of gradient [tokens, hidden] to row ids[token] of kept [rows, hidden] fp32."""
    if SWITCH.takes(gradient):
        _fused(kept, gradient, ids)
        return
    SWITCH.fell_back(gradient)
    add_embedding_gradient_plain(kept, gradient, ids)


def add_embedding_gradient_plain(kept: Tensor, gradient: Tensor, ids: Tensor) -> None:
    """The same in plain torch, whose order of additions is free on a GPU."""
    kept.index_add_(0, ids, gradient.to(kept.dtype))


def add_embedding_gradient_reference(kept: Tensor, gradient: Tensor, ids: Tensor) -> None:
    """The same token by token in float64, for tests."""
    for row, token in zip(ids.tolist(), gradient, strict=True):
        kept[row] += token


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        # Not saved: other layers write to the buffer before this one's turn comes, as they should.
        ctx.kept = kept
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        ids, weight = ctx.saved_tensors
        add_embedding_gradient(ctx.kept, gradient.reshape(-1, gradient.shape[-1]), ids.reshape(-1))
        return None, torch.empty_like(weight), None


def _sample(label: str, rows: int, hidden: int, ids: list[int], size: float = 1.0) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        kept = random_tensor(rows, hidden, device=device, dtype=torch.float32, leaf=False)
        gradient = random_tensor(len(ids), hidden, device=device, dtype=dtype, seed=1, size=size, leaf=False)
        return Call(arguments=(kept, gradient, torch.tensor(ids, dtype=torch.int64, device=device)))

    return Sample(label=label, make=make, gradients=False)


def _case(rows: int, hidden: int, tokens: int) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        ids = torch.randint(rows, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
        gradient = random_tensor(tokens, hidden, device=device, dtype=dtype, leaf=False)
        return Call(arguments=(torch.zeros(rows, hidden, device=device), gradient, ids))

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        return tokens * hidden * (dtype.itemsize + 8), 0

    return BenchmarkCase(label=f"{tokens} tokens, {rows}x{hidden}", make=make, bytes_moved=bytes_moved)


def _results(call: Call, _: Any) -> tuple[Tensor, ...]:
    return (call.arguments[0],)


_TOLERANCE = Tolerance(ulps=1, wide=8, reason="a sum of some tokens in fp32")

register(
    Op(
        name="embedding_gradient",
        switch="embedding",
        summary="gradient of looked-up rows, added to the fp32 buffer",
        function=add_embedding_gradient,
        plain=add_embedding_gradient_plain,
        reference=add_embedding_gradient_reference,
        samples=(
            _sample("some rows", 11, 16, [3, 0, 10, 3, 3, 7]),
            _sample("odd width", 5, 13, [4, 4, 1, 0]),
            _sample("one token", 3, 1, [2]),
            _sample("one row for all", 4, 1040, [1] * 37),
            _sample("large numbers", 4, 24, [0, 3, 0], size=1e4),
            _sample("no tokens", 3, 8, []),
        ),
        cases=(_case(40064, 4096, 8192),),
        tolerance=_TOLERANCE,
        gradient_tolerance=_TOLERANCE,
        plain_tolerance=_TOLERANCE,
        torch_ops=("embedding_gradient_",),
        differentiable=False,
        results=_results,
    )
)
