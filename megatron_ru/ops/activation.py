"""The six activations of the feed-forward block, with an optional bias."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_ru.foundation.errors import UserError

_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu,
}
_GATES = {"reglu": "relu", "geglu": "gelu", "swiglu": "swish"}

ACTIVATIONS = (*_POINTWISE, *_GATES)


def is_gated(kind: str) -> bool:
    """Whether the activation halves its input: one half gates the other."""
    return kind in _GATES


def activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`f(x + bias)`, or `f(gate + bias_gate) · (up + bias_up)` for the gated kinds, in the dtype of `x`.

    x: [..., ffn], or [..., 2·ffn] with the gate in the first half for the gated kinds; bias has x's last size or is
    None. Returns [..., ffn]. Raises `UserError` for a kind that is not one of `ACTIVATIONS`.
    Sources: Hendrycks and Gimpel, 2016 (GELU); Ramachandran et al., 2017 (Swish); Shazeer, 2020, "GLU Variants
    Improve Transformer", equations 5 and 6.
    """
    if kind not in ACTIVATIONS:
        raise UserError(f"activation {kind!r} is unknown, expected one of {', '.join(ACTIVATIONS)}")
    if bias is not None:
        x = x + bias
    if kind in _POINTWISE:
        return _POINTWISE[kind](x)
    gate, up = x.chunk(2, dim=-1)
    return _POINTWISE[_GATES[kind]](gate) * up


def activation_reference(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The same by the formulas, in float64, for tests."""
    wide = x.double() if bias is None else x.double() + bias.double()
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": lambda a: a.clamp(min=0),
        "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))),
        "gelu_tanh": lambda a: a * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
        "swish": lambda a: a / (1 + torch.exp(-a)),
    }
    if not is_gated(kind):
        return formulas[kind](wide)
    half = wide.shape[-1] // 2
    return formulas[_GATES[kind]](wide[..., :half]) * wide[..., half:]
