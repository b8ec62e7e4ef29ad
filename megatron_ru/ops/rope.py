"""Rotary position embedding of queries and keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register

SWITCH = switch("rope")
_fused = operator("rope")
_fused_qk = operator("rope_qk")
_fused_qk_ = operator("rope_qk_")
_fused_positions = operator("packed_positions")
_WHOLE = frozenset((torch.int32, torch.int64))


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(q, k) with their channels turned by the angle of their position: (a cos - b sin, b cos + a sin) for each pair.

    q: [sequence, batch, heads, head_dim] or, packed, [tokens, heads, head_dim]; k the same with its own number of
    heads, or None. The channels of a head lie side by side; other strides are free, so q and k may be slices of one
    tensor. cos and sin: [table rows, rotary/2] in fp32 (fp64 beside fp64), as `rope_table` gives them. A pair is
    (i, i + rotary/2), or (2i, 2i + 1) when `interleaved`; channels from `rotary` on stay as they are.
    Token s stands at offset + s, or at offset + positions[s], int64 [sequence] or [sequence, batch]; a position outside
    the table gives NaN, an `offset` beyond it is an error. `inverse` turns the other way. `in_place` writes over q and
    k, which must be needed by nobody else. Inside, numbers are fp32; the result is rounded once.
    Source: Su et al., 2021, "RoFormer", equation 34.
    """
    if SWITCH.takes(q) and cos.dtype is (torch.float64 if q.dtype is torch.float64 else torch.float32):
        if in_place:
            return _in_place(q, k, cos, sin, positions, offset, interleaved, inverse, True)
        if k is None:
            return _fused(q, cos, sin, positions, offset, interleaved, inverse), None
        return _fused_qk(q, k, cos, sin, positions, offset, interleaved, inverse)
    SWITCH.fell_back(q, f"the angles are {cos.dtype} beside {q.dtype}" if SWITCH.takes(q) else None)
    if in_place:
        return _in_place(q, k, cos, sin, positions, offset, interleaved, inverse, False)
    return rope_plain(q, k, cos, sin, positions=positions, offset=offset, interleaved=interleaved, inverse=inverse)


def rope_table(
    angles: int | Tensor,
    rotary: int | None = None,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    scale: float = 1.0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [rows, rotary/2], contiguous, times `scale` (YaRN's attention factor).

    angles: a number of positions, of which `rotary` channels are turned by position / base^(2i/rotary), computed in
    fp64 and rounded once; or the angles themselves as Megatron's RotaryEmbedding gives them, fp32 [rows, 1, 1, rotary],
    where each angle stands twice: in both halves, or side by side when `interleaved`.
    """
    if isinstance(angles, int):
        if rotary is None or rotary % 2:
            raise UserError(
                f"a table of {angles} positions was asked for with rotary={rotary}: expected an even number"
            )
        exponents = torch.arange(0, rotary, 2, dtype=torch.float64, device=device) / rotary
        turned = torch.arange(angles, dtype=torch.float64, device=device)[:, None] / base**exponents
    else:
        rows = angles.reshape(angles.shape[0], angles.shape[-1])
        turned = rows[:, ::2] if interleaved else rows[:, : rows.shape[1] // 2]
    return (turned.cos() * scale).to(dtype), (turned.sin() * scale).to(dtype)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: the place of each token within its own sequence, for sequences laid end to end.

    cu_seqlens: int32 or int64 [sequences + 1], where each begins and the last ends, from 0. Tokens after the last
    sequence, as padding has them, count on from its beginning.
    """
    if SWITCH.takes(cu_seqlens, _WHOLE):
        return _fused_positions(cu_seqlens, total)
    return packed_positions_plain(cu_seqlens, total)


def rope_plain(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch; `in_place` asks for nothing here."""
    cosine, sine = _angles_of_tokens(q, cos, sin, positions, offset)
    if inverse:
        sine = -sine
    return tuple(None if x is None else _turn(x, cosine, sine, interleaved) for x in (q, k))  # type: ignore[return-value]


def packed_positions_plain(cu_seqlens: Tensor, total: int) -> Tensor:
    """The same in plain torch."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    # The last boundary opens no sequence; with no sequence at all, everything counts from the only boundary.
    opens = starts[:-1] if starts.numel() > 1 else starts
    return tokens - opens[torch.searchsorted(opens, tokens, right=True).sub(1).clamp(min=0)]


def rope_reference(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in float64, pairs as complex numbers, for tests: (a + bi) · e^(i angle)."""
    rows = torch.arange(q.shape[0], device=q.device) if positions is None else positions
    rows = rows + offset
    inside = (rows >= 0) & (rows < cos.shape[0])
    angle = torch.complex(cos.double(), -sin.double() if inverse else sin.double())[rows.clamp(0, cos.shape[0] - 1)]
    angle = torch.where(inside[..., None], angle, torch.full_like(angle, complex("nan+nanj")))
    angle = _over_heads(angle, q)
    half = cos.shape[1]

    def turned(x: Tensor) -> Tensor:
        wide = x.double()
        front, rest = wide[..., : 2 * half], wide[..., 2 * half :]
        pairs = front.unflatten(-1, (half, 2)) if interleaved else front.unflatten(-1, (2, half)).transpose(-1, -2)
        turned = torch.complex(pairs[..., 0], pairs[..., 1]) * angle
        product = torch.stack((turned.real, turned.imag), dim=-1)
        front = product.flatten(-2) if interleaved else product.transpose(-1, -2).flatten(-2)
        return torch.cat((front, rest), dim=-1)

    return turned(q), None if k is None else turned(k)


def _in_place(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    fused: bool,
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        return _RopeInPlace.apply(q, k, cos, sin, positions, offset, interleaved, inverse, fused)  # type: ignore[no-any-return]
    _turn_in_place(q, k, cos, sin, positions, offset, interleaved, inverse, fused)
    return q, k


def _turn_in_place(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    fused: bool,
) -> None:
    if fused:
        # Where there is no key, one of no heads stands for it.
        _fused_qk_(q, q[..., :0, :] if k is None else k, cos, sin, positions, offset, interleaved, inverse)
        return
    turned = rope_plain(q, k, cos, sin, positions=positions, offset=offset, interleaved=interleaved, inverse=inverse)
    q.copy_(turned[0])
    if k is not None and turned[1] is not None:
        k.copy_(turned[1])


class _RopeInPlace(torch.autograd.Function):
    """Turns q and k where they lie. Backward turns their gradients back, into new tensors: those may be shared."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        offset: int,
        interleaved: bool,
        inverse: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.turn = (offset, interleaved, inverse, fused)
        _turn_in_place(q, k, cos, sin, positions, offset, interleaved, inverse, fused)
        ctx.mark_dirty(*(x for x in (q, k) if x is not None))
        ctx.set_materialize_grads(False)
        return q, k

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        offset, interleaved, inverse, fused = ctx.turn
        back = []
        for gradient in gradients:
            if gradient is None:
                back.append(None)
            elif fused:
                back.append(_fused(gradient, cos, sin, positions, offset, interleaved, not inverse))
            else:
                back.append(
                    rope_plain(
                        gradient, None, cos, sin,
                        positions=positions, offset=offset, interleaved=interleaved, inverse=not inverse,
                    )[0]
                )  # fmt: skip
        return (*back, None, None, None, None, None, None, None)


def _angles_of_tokens(
    q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each token, broadcastable over the heads of q."""
    table_rows = cos.shape[0]
    if positions is None:
        if offset < 0 or offset + q.shape[0] > table_rows:
            raise UserError(
                f"positions {offset} to {offset + q.shape[0]} were asked for, but the table has {table_rows} rows: "
                "make a longer table"
            )
        found = (cos[offset : offset + q.shape[0]], sin[offset : offset + q.shape[0]])
    else:
        rows = positions + offset
        outside = ((rows < 0) | (rows >= table_rows))[..., None]
        rows = rows.clamp(0, table_rows - 1)
        found = (cos[rows].masked_fill(outside, float("nan")), sin[rows].masked_fill(outside, float("nan")))
    return _over_heads(found[0], q), _over_heads(found[1], q)


def _over_heads(angles: Tensor, q: Tensor) -> Tensor:
    """angles [sequence, rotary/2] or [sequence, batch, rotary/2] with the missing dimensions of q as ones."""
    missing = [1] * (q.dim() - angles.dim())
    return angles.reshape(*angles.shape[:-1], *missing, angles.shape[-1])


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    front = x[..., :rotary].to(wide)
    a, b = (front[..., ::2], front[..., 1::2]) if interleaved else front.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    front = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    front = front.to(x.dtype)
    return front if rotary == x.shape[-1] else torch.cat((front, x[..., rotary:]), dim=-1)


def _sample(
    label: str,
    shape: tuple[int, ...],
    kv_heads: int | None,
    *,
    rotary: int | None = None,
    rows: int = 64,
    positions: Callable[[], Tensor] | None = None,
    fused_qkv: bool = False,
    size: float = 1.0,
    gradients: bool = True,
    **keywords: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        *front, heads, head_dim = shape
        total = heads + 2 * (kv_heads or 0)
        if fused_qkv:
            # Slices of what one linear layer gives: their heads lie far apart.
            qkv = random_tensor(*front, total, head_dim, device=device, dtype=dtype, leaf=False)
            q, k = qkv[..., :heads, :], qkv[..., heads : heads + (kv_heads or 0), :]
        else:
            q = random_tensor(*shape, device=device, dtype=dtype, size=size, leaf=False)
            k = random_tensor(
                *front, kv_heads or 0, head_dim, device=device, dtype=dtype, seed=1, size=size, leaf=False
            )
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = rope_table(rows, rotary or head_dim, base=100.0, device=device, dtype=wide)
        where = {} if positions is None else {"positions": positions().to(device)}
        leaves = [q.detach().requires_grad_(gradients), k.detach().requires_grad_(gradients) if kv_heads else None]
        return Call(arguments=(*leaves, cos, sin), keywords={**where, **keywords})

    return Sample(label=label, make=make, gradients=gradients)


def _case(label: str, sequence: int, batch: int, heads: int, kv_heads: int, head_dim: int) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        q = random_tensor(sequence, batch, heads, head_dim, device=device, dtype=dtype)
        k = random_tensor(sequence, batch, kv_heads, head_dim, device=device, dtype=dtype, seed=1)
        return Call(arguments=(q, k, *rope_table(sequence, head_dim, device=device)))

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        elements = sequence * batch * (heads + kv_heads) * head_dim
        return 2 * elements * dtype.itemsize, 2 * elements * dtype.itemsize

    return BenchmarkCase(label=label, make=make, bytes_moved=bytes_moved)


register(
    Op(
        name="rope",
        switch="rope",
        summary="rotary position embedding of q and k",
        function=rope,
        plain=rope_plain,
        reference=rope_reference,
        samples=(
            _sample("one token", (1, 1, 1, 2), 1),
            _sample("grouped heads", (7, 2, 4, 16), 2),
            _sample("grouped heads, interleaved", (7, 2, 4, 16), 2, interleaved=True),
            _sample("common head", (5, 1, 3, 128), 1, inverse=True),
            # Two-thirds of a head and one pair of it: no vector width divides them.
            _sample("part of a head", (5, 2, 3, 18), 3, rotary=12),
            _sample("part of a head, interleaved", (5, 2, 3, 18), 3, rotary=6, interleaved=True),
            _sample("one pair", (3, 2, 2, 7), 1, rotary=2),
            _sample("q alone", (9, 2, 3, 8), None),
            _sample("offset of a context-parallel rank", (9, 2, 3, 8), 1, offset=31),
            _sample("packed", (11, 3, 8), 1, positions=lambda: torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 63])),
            _sample(
                "positions of each sample",
                (5, 2, 2, 8),
                1,
                offset=2,
                interleaved=True,
                positions=lambda: torch.arange(10).reshape(2, 5).t(),
            ),
            _sample(
                "outside the table", (4, 1, 2, 8), 1, positions=lambda: torch.tensor([-1, 0, 64, 63]), gradients=False
            ),
            _sample("slices of a fused tensor", (6, 2, 4, 32), 2, fused_qkv=True),
            _sample("slices of a fused tensor, interleaved", (6, 2, 4, 32), 2, fused_qkv=True, interleaved=True),
            _sample("no tokens", (0, 2, 2, 8), 1),
            _sample("large", (4, 1, 2, 8), 1, size=1e4),
            _sample("denormal fp16", (4, 1, 2, 8), 1, size=1e-7),
            _sample("in place", (6, 2, 4, 32), 2, in_place=True, gradients=False),
        ),
        cases=(
            _case("4096x2x(32+8)x128", 4096, 2, 32, 8, 128),
            _case("8192x1x(32+8)x128", 8192, 1, 32, 8, 128),
        ),
        tolerance=Tolerance(ulps=0.5, wide=2, reason="two products and a sum in fp32, rounded once"),
        gradient_tolerance=Tolerance(ulps=0.5, wide=2, reason="the same turn, backwards"),
        plain_tolerance=Tolerance(ulps=0.5, wide=2, reason="the same arithmetic in fp32"),
        torch_ops=("rope", "rope_qk", "rope_qk_", "packed_positions"),
    )
)
