"""Queries, keys and values as views of one projection's output, with queries and keys rotated where they lie."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register
from megatron_ru.ops.rope import rope, rope_plain, rope_reference, rope_table

SWITCH = switch("rope")
_fused_join = operator("rope_join")


def rotary_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries [sequence, batch, groups, queries, head_dim], keys, values [sequence, batch, groups, head_dim]), all
    three views of one tensor, with queries and keys turned as `rope` turns them.

    qkv: [sequence, batch, groups, queries + 2, head_dim], contiguous: for each key head its queries, the key, the
    value, as Megatron's projection has them. cos and sin: as for `rope`. `in_place` turns where qkv lies, which must be
    needed by nobody else. The gradient is laid together and turned back in one pass.
    """
    if torch.compiler.is_compiling():
        # A compiler lays the copies out by itself, and cannot follow a tensor that changes behind autograd's back.
        turned = rope(qkv[..., :-1, :].flatten(1, 2), None, cos, sin, interleaved=interleaved)[0]
        turned = turned.unflatten(1, qkv.shape[1:3])
        return turned[..., :-1, :], turned[..., -1, :], qkv[..., -1, :]
    return _RotaryQKV.apply(qkv if in_place else qkv.clone(), cos, sin, interleaved)  # type: ignore[no-any-return]


def rotary_qkv_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch; `in_place` asks for nothing here."""
    turned = rope_plain(qkv[..., :-1, :].flatten(1, 2), None, cos, sin, interleaved=interleaved)[0]
    turned = turned.unflatten(1, qkv.shape[1:3])
    return turned[..., :-1, :], turned[..., -1, :], qkv[..., -1, :]


def rotary_qkv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, for tests."""
    turned = rope_reference(qkv[..., :-1, :].flatten(1, 2), None, cos, sin, interleaved=interleaved)[0]
    turned = turned.unflatten(1, qkv.shape[1:3])
    return turned[..., :-1, :], turned[..., -1, :], qkv.double()[..., -1, :]


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        # Beside the batch the groups are one dimension with it, and a group's queries and key are heads of one tensor.
        rope(qkv.detach()[..., :-1, :].flatten(1, 2), None, cos, sin, interleaved=interleaved, in_place=True)
        return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        groups = queries.shape[1:3]
        parts = queries.flatten(1, 2), keys.flatten(1, 2).unsqueeze(2), values.flatten(1, 2).unsqueeze(2)
        if SWITCH.takes(queries):
            joined = _fused_join(*parts, cos, sin, ctx.interleaved, True)
        else:
            q, k = rope_plain(*parts[:2], cos, sin, interleaved=ctx.interleaved, inverse=True)
            joined = torch.cat((q, k, parts[2]), dim=2)
        return joined.unflatten(1, groups), None, None, None


def _sample(label: str, shape: tuple[int, ...], *, rotary: int | None = None, **keywords: Any) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        qkv = random_tensor(*shape, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        table = rope_table(64, rotary or shape[-1], base=100.0, device=device, dtype=wide)
        return Call(arguments=(qkv, *table), keywords=keywords)

    return Sample(label=label, make=make)


def _case(label: str, sequence: int, batch: int, heads: int, groups: int, head_dim: int) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        qkv = random_tensor(sequence, batch, groups, heads // groups + 2, head_dim, device=device, dtype=dtype)
        return Call(arguments=(qkv, *rope_table(sequence, head_dim, device=device)))

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        token = (heads + 2 * groups) * head_dim * dtype.itemsize
        return 2 * sequence * batch * token, 2 * sequence * batch * token

    return BenchmarkCase(label=label, make=make, bytes_moved=bytes_moved)


register(
    Op(
        name="rotary_qkv",
        switch="rope",
        summary="queries, keys and values of one projection, rotated",
        function=rotary_qkv,
        plain=rotary_qkv_plain,
        reference=rotary_qkv_reference,
        samples=(
            _sample("grouped", (5, 2, 3, 4, 16)),
            _sample("grouped, interleaved", (5, 2, 3, 4, 16), interleaved=True),
            _sample("a key for each query", (7, 1, 4, 3, 8)),
            _sample("one group", (3, 2, 1, 7, 18)),
            _sample("part of a head", (4, 2, 2, 4, 20), rotary=12),
            _sample("no tokens", (0, 2, 2, 4, 8)),
        ),
        cases=(_case("4096x2x(32+2·8)x128", 4096, 2, 32, 8, 128),),
        tolerance=Tolerance(ulps=0.5, wide=2, reason="two products and a sum in fp32, rounded once"),
        gradient_tolerance=Tolerance(ulps=0.5, wide=2, reason="the same turn, backwards"),
        plain_tolerance=Tolerance(ulps=0.5, wide=2, reason="the same arithmetic in fp32"),
        torch_ops=("rope_join",),
    )
)
