"""The six activations of the feed-forward block, with an optional bias, and SwiGLU's kin on two tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import FLOATS, BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register

_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu,
}
_GATES = {"reglu": "relu", "geglu": "gelu", "swiglu": "swish"}

ACTIVATIONS = (*_POINTWISE, *_GATES)
_INDEX = {kind: index for index, kind in enumerate(ACTIVATIONS)}

SWITCH = switch("activation")
_fused = operator("activation")
_fused_saving = operator("activation_saving")
_fused_glu = operator("glu")


def is_gated(kind: str) -> bool:
    """Whether the activation halves its input: one half gates the other."""
    return kind in _GATES


def activation(x: Tensor, bias: Tensor | None, kind: str, in_place_backward: bool = False) -> Tensor:
    """`f(x + bias)`, or `f(gate + bias_gate) · (up + bias_up)` for the gated kinds, in the dtype of `x`.

    x: [..., ffn], or [..., 2·ffn] with the gate in the first half for the gated kinds; bias has x's last size or is
    None. Returns [..., ffn]. The fused form keeps x alone and computes the activation anew in the backward; with
    `in_place_backward` the gradient is written over x, which must be needed by nobody else, and a second backward is
    an error. Inside, numbers are fp32; the result is rounded once.
    Raises `UserError` for a kind that is not one of `ACTIVATIONS`.
    Sources: Hendrycks and Gimpel, 2016 (GELU); Ramachandran et al., 2017 (Swish); Shazeer, 2020, "GLU Variants
    Improve Transformer", equations 5 and 6.
    """
    if SWITCH.takes(x) and kind in _INDEX and (bias is None or bias.dtype is x.dtype):
        return (_fused_saving if in_place_backward else _fused)(x, bias, _INDEX[kind])
    SWITCH.fell_back(x, "the bias has another dtype" if kind in _INDEX and SWITCH.takes(x) else None)
    return activation_plain(x, bias, kind)


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`f(gate) · up` for a gated kind of `ACTIVATIONS`, where two layers gave the halves: [..., ffn] each."""
    if SWITCH.takes(gate) and kind in _GATES and up.dtype is gate.dtype:
        return _fused_glu(gate, up, _INDEX[kind])
    SWITCH.fell_back(gate, "gate and up differ in dtype" if kind in _GATES and SWITCH.takes(gate) else None)
    return glu_plain(gate, up, kind)


def activation_plain(x: Tensor, bias: Tensor | None, kind: str, in_place_backward: bool = False) -> Tensor:
    """The same in plain torch; `in_place_backward` asks for nothing here."""
    if kind not in ACTIVATIONS:
        raise UserError(f"activation {kind!r} is unknown, expected one of {', '.join(ACTIVATIONS)}")
    if bias is not None:
        x = x + bias
    if kind in _POINTWISE:
        return _POINTWISE[kind](x)
    if x.shape[-1] % 2:
        raise UserError(f"{kind} takes a gate and an up half, but the last size is {x.shape[-1]}: expected an even one")
    return glu_plain(*x.chunk(2, dim=-1), kind)


def glu_plain(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The same in plain torch."""
    if kind not in _GATES:
        raise UserError(f"{kind!r} is no gated activation, expected one of {', '.join(_GATES)}")
    return _POINTWISE[_GATES[kind]](gate) * up


def activation_reference(x: Tensor, bias: Tensor | None, kind: str, in_place_backward: bool = False) -> Tensor:
    """The same by the formulas, in float64, for tests."""
    wide = x.double() if bias is None else x.double() + bias.double()
    if not is_gated(kind):
        return _FORMULAS[kind](wide)
    half = wide.shape[-1] // 2
    return glu_reference(wide[..., :half], wide[..., half:], kind)


def glu_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The same by the formulas, in float64, for tests."""
    return _FORMULAS[_GATES[kind]](gate.double()) * up.double()


_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    # Not clamp, whose slope at 0 is 1.
    "relu": torch.relu,
    "gelu": lambda a: a * 0.5 * torch.erfc(-a / math.sqrt(2)),
    "gelu_tanh": lambda a: a * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)),
    "swish": lambda a: a * torch.sigmoid(a),
}


def _sample(
    label: str,
    kind: str,
    rows: tuple[int, ...],
    width: int,
    *,
    bias: bool = False,
    wider: int = 0,
    size: float = 2.0,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    gradients: bool = True,
    **keywords: Any,
) -> Sample:
    """Rows of `width` results; of a tensor that is `wider` by some columns."""

    def make(device: str, dtype: torch.dtype) -> Call:
        columns = 2 * width if is_gated(kind) else width
        x = random_tensor(*rows, columns + wider, device=device, dtype=dtype, size=size, leaf=False)[..., :columns]
        shift = random_tensor(columns, device=device, dtype=dtype, seed=1) if bias else None
        # ReLU has no derivative at zero: no entry may stand there.
        x = torch.where(x == 0, torch.ones_like(x), x) if wider == 0 else x
        return Call(arguments=(x.detach().requires_grad_(), shift, kind), keywords=keywords)

    return Sample(label=f"{kind}: {label}", make=make, dtypes=dtypes, gradients=gradients)


def _samples() -> tuple[Sample, ...]:
    found = []
    for kind in ACTIVATIONS:
        found += [
            # No vector width divides 33; 1030 is longer than what a thread takes at once.
            _sample("odd", kind, (5, 3), 33),
            _sample("odd, with a bias", kind, (5, 3), 33, bias=True),
            _sample("one number", kind, (1,), 1),
            _sample("one row", kind, (1,), 1030, bias=True),
            _sample("rows of a wider tensor", kind, (2, 9), 17, wider=5),
            _sample("no rows", kind, (0,), 8, bias=True),
            _sample("large", kind, (3,), 40, size=1e3),
            _sample("largest fp16", kind, (3,), 40, size=2e4, dtypes=(torch.float16,), gradients=False),
            _sample("denormal fp16", kind, (3,), 40, size=1e-7, dtypes=(torch.float16,)),
            _sample("gradient over the input", kind, (4,), 24, bias=True, in_place_backward=True),
        ]
    return tuple(found)


def _glu_samples() -> tuple[Sample, ...]:
    def make_sample(label: str, kind: str, rows: tuple[int, ...], width: int, wider: int = 0) -> Sample:
        def make(device: str, dtype: torch.dtype) -> Call:
            gate, up = (
                random_tensor(*rows, width + wider, device=device, dtype=dtype, seed=seed, size=2, leaf=False)
                for seed in (0, 1)
            )
            return Call(
                arguments=(
                    gate[..., :width].detach().requires_grad_(),
                    up[..., wider:].detach().requires_grad_(),
                    kind,
                )
            )

        return Sample(label=f"{kind}: {label}", make=make)

    return tuple(
        sample
        for kind in _GATES
        for sample in (
            make_sample("odd", kind, (5, 3), 33),
            make_sample("one number", kind, (1,), 1),
            # Columns of a wider tensor begin where no vector does.
            make_sample("columns of wider tensors", kind, (9,), 50, wider=3),
        )
    )


def _case(kind: str, tokens: int, ffn: int, *, bias: bool = False, in_place: bool = False) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        columns = 2 * ffn if is_gated(kind) else ffn
        x = random_tensor(tokens, columns, device=device, dtype=dtype)
        shift = random_tensor(columns, device=device, dtype=dtype, seed=1) if bias else None
        return Call(arguments=(x, shift, kind), keywords={"in_place_backward": True} if in_place else {})

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        tensor = tokens * ffn * dtype.itemsize
        return (3 * tensor, 5 * tensor) if is_gated(kind) else (2 * tensor, 3 * tensor)

    how = (" with bias" if bias else "") + (" in place" if in_place else "")
    return BenchmarkCase(label=f"{kind}{how} {tokens}x{ffn}", make=make, bytes_moved=bytes_moved)


def _glu_case(kind: str, tokens: int, ffn: int) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        halves = (random_tensor(tokens, ffn, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
        return Call(arguments=(*halves, kind))

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        return 3 * tokens * ffn * dtype.itemsize, 5 * tokens * ffn * dtype.itemsize

    return BenchmarkCase(label=f"{kind} {tokens}x{ffn}", make=make, bytes_moved=bytes_moved)


_TOLERANCE = Tolerance(
    ulps=0.5,
    wide=8,
    reason="rounded once after fp32; a tail of GELU is a difference, whose error is that of its terms",
)
_GRADIENT_TOLERANCE = Tolerance(
    ulps=0.5,
    wide=32,
    rough=1,
    reason="rounded once after fp32; the bias' gradient is the sum of rows already rounded",
)
_PLAIN_TOLERANCE = Tolerance(ulps=2, wide=16, rough=4, reason="torch rounds after each of three steps")

register(
    Op(
        name="activation",
        switch="activation",
        summary="activations of the feed-forward block, gated and plain",
        function=activation,
        plain=activation_plain,
        reference=activation_reference,
        samples=_samples(),
        cases=(
            *(_case(kind, 8192, 14336) for kind in _GATES),
            _case("swiglu", 16384, 14336),
            _case("swiglu", 8192, 14336, in_place=True),
            _case("gelu", 8192, 14336, bias=True),
        ),
        tolerance=_TOLERANCE,
        gradient_tolerance=_GRADIENT_TOLERANCE,
        plain_tolerance=_PLAIN_TOLERANCE,
        torch_ops=("activation", "activation_saving"),
    )
)
register(
    Op(
        name="glu",
        switch="activation",
        summary="gated activations of two tensors",
        function=glu,
        plain=glu_plain,
        reference=glu_reference,
        samples=_glu_samples(),
        cases=(_glu_case("swiglu", 8192, 14336),),
        tolerance=_TOLERANCE,
        gradient_tolerance=_GRADIENT_TOLERANCE,
        plain_tolerance=_PLAIN_TOLERANCE,
        torch_ops=("glu",),
    )
)
