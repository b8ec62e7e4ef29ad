"""Norm modules that Megatron's layers can hold: RMSNorm and LayerNorm, with sequence parallelism."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.layer_norm import layer_norm
from megatron_ru.ops.rms_norm import add_rms_norm, rms_norm

_BESIDE = "_megatron_ru_normed"


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension; weight [hidden].

    Called with a residual it computes sum and norm in one op, gives the sum, and lays the norm beside it: the next call
    with that very tensor takes it from there.
    """

    def __init__(self, hidden_size: int, eps: float, *, zero_centered: bool = False, sequence_parallel: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = _parameter(hidden_size, 0.0 if zero_centered else 1.0, sequence_parallel)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The normalised x [..., hidden], in the dtype of x; with a `residual` of x's shape and dtype, their sum."""
        if residual is not None:
            normed, total = add_rms_norm(x, residual, self.weight, self.eps, self.zero_centered)
            setattr(total, _BESIDE, (self, normed))
            return total
        owner, normed = getattr(x, _BESIDE, (None, None))
        if owner is not self:
            return rms_norm(x, self.weight, self.eps, self.zero_centered)
        # The sum lives on in the residual stream; what lay beside it need not.
        delattr(x, _BESIDE)
        return normed  # type: ignore[no-any-return]


class LayerNorm(nn.Module):
    """Layer norm over the last dimension; weight and bias [hidden]."""

    def __init__(self, hidden_size: int, eps: float, *, zero_centered: bool = False, sequence_parallel: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = _parameter(hidden_size, 0.0 if zero_centered else 1.0, sequence_parallel)
        self.bias = _parameter(hidden_size, 0.0, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [..., hidden], in the dtype of x."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.zero_centered)


_NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


class Norm:
    """What a layer spec names: calling it with Megatron's keywords gives the norm that the config asks for."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        """A norm module. Later keywords of Megatron's norm builders are accepted and do not matter here."""
        if config.normalization not in _NORMS:
            raise UserError(f"--normalization {config.normalization} is unknown, expected {' or '.join(_NORMS)}")
        return _NORMS[config.normalization](
            hidden_size,
            eps,
            zero_centered=config.layernorm_zero_centered_gamma,
            sequence_parallel=config.sequence_parallel,
        )


def _parameter(size: int, value: float, sequence_parallel: bool) -> nn.Parameter:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    parameter = nn.Parameter(torch.full((size,), value, device=device))
    # With sequence parallelism each rank sees a part of the tokens: Megatron sums such gradients over the
    # tensor-parallel group when it finds this mark.
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    return parameter
