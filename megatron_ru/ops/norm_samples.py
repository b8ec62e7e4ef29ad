"""What RMSNorm and LayerNorm, with and without a residual, are tested and timed on."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_ru.ops.op import FLOATS, HALF, BenchmarkCase, Call, Sample, Tolerance, random_tensor

TOLERANCE = Tolerance(
    ulps=0.5,
    wide=8,
    reason="rounded once; before that, fp32: the moments of a row are sums in blocks, then four operations",
)
SUM_TOLERANCE = Tolerance(
    ulps=1,
    wide=8,
    rough=1,
    reason="what is normed is the sum as rounded to the dtype, which the formula does not round",
)
GRADIENT_TOLERANCE = Tolerance(
    ulps=0.5,
    wide=64,
    rough=1,
    reason="rounded once after fp32 sums over a row and over rows; with a residual the rounded sum enters",
)
PLAIN_TOLERANCE = Tolerance(
    ulps=1.5,
    wide=64,
    rough=16,
    reason="torch rounds between its steps, and sums a bf16 weight's gradient in bf16 on a CPU",
)

_EPS = 1e-5


def samples(*, residual: bool, bias: bool) -> tuple[Sample, ...]:
    """Odd sizes, strides and extreme values."""
    sample = partial(_sample, residual=residual, bias=bias)
    return (
        sample("one row of a common size", (1, 4096)),
        # All that LayerNorm finds there is an error, which it multiplies with the root of 1/eps.
        sample("rows of one number", (3, 1), scale=1e3),
        # No vector width divides these; the last has more rows than a block of a grid or a thread takes.
        sample("odd", (5, 7)),
        sample("odd, three dimensions", (2, 3, 65), zero_centered=True),
        sample("longer than a thousand", (4, 1, 1023)),
        sample("longer than a block", (2, 8200)),
        sample("many rows", (700, 96)),
        sample("no rows", (0, 16)),
        sample("rows of a wider tensor", (6, 40), view=lambda x: x[:, :33], zero_centered=True),
        sample("transposed", (4, 6, 33), view=lambda x: x.transpose(0, 1)),
        sample("every third channel", (4, 99), view=lambda x: x[:, ::3]),
        sample("one row seen five times", (1, 33), view=lambda x: x.expand(5, 33)),
        sample("fp32 weights", (9, 130), weight_dtype=torch.float32, dtypes=HALF),
        sample("fp32 weights around zero", (9, 130), weight_dtype=torch.float32, zero_centered=True, dtypes=HALF),
        # Squares stay inside fp32; those of 65504, the largest fp16, would not stay inside fp16.
        sample("largest fp16", (3, 129), dtypes=(torch.float16,), view=lambda x: x.sign() * 65504, gradients=False),
        sample("large", (3, 129), size=1e15, dtypes=(torch.float32, torch.bfloat16), gradients=False),
        # Far below the root of eps: the result is x times 316.
        sample("denormal fp16", (3, 129), size=3e-7, dtypes=(torch.float16,), gradients=False),
        sample("denormal", (3, 129), size=1e-39, dtypes=(torch.float32, torch.bfloat16), gradients=False),
        sample("rows of equal numbers", (3, 64), size=0.0, shift=7.0, scale=2e3),
        # Half precision rounds the sum of two such numbers by a part of what is left when their mean is taken off.
        sample("far from zero", (3, 257), shift=100.0, scale=100.0, dtypes=(torch.float32,) if residual else FLOATS),
    )


def cases(*, residual: bool, bias: bool) -> tuple[BenchmarkCase, ...]:
    """Common hidden sizes at two numbers of tokens."""
    return tuple(
        _case(tokens, hidden, residual=residual, bias=bias) for tokens in (8192, 16384) for hidden in (2560, 4096, 8192)
    )


def _sample(
    label: str,
    shape: tuple[int, ...],
    *,
    residual: bool,
    bias: bool,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    weight_dtype: torch.dtype | None = None,
    zero_centered: bool = False,
    size: float = 1.0,
    shift: float = 0.0,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    scale: float | None = None,
    gradients: bool = True,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        def rows(seed: int) -> Tensor:
            made = random_tensor(*shape, device=device, dtype=dtype, seed=seed, size=size, shift=shift, leaf=False)
            return view(made).detach().requires_grad_()

        if not residual:
            return _call(rows(0), None, bias, weight_dtype, zero_centered)
        # Half of each, so that the sum of extremes stays within the dtype.
        halves = [rows(seed).detach().div(2).requires_grad_() for seed in (0, 1)]
        return _call(halves[0], halves[1], bias, weight_dtype, zero_centered)

    return Sample(label=label, make=make, dtypes=dtypes, scale=scale, gradients=gradients)


def _case(tokens: int, hidden: int, *, residual: bool, bias: bool) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        x = random_tensor(tokens, hidden, device=device, dtype=dtype)
        added = random_tensor(tokens, hidden, device=device, dtype=dtype, seed=1) if residual else None
        return _call(x, added, bias, None, zero_centered=False)

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        # x and y, then dy, x and dx; with a residual also residual and sum, then the sum's gradient.
        tensor = tokens * hidden * dtype.itemsize
        return (4 * tensor, 4 * tensor) if residual else (2 * tensor, 3 * tensor)

    return BenchmarkCase(label=f"{tokens}x{hidden}", make=make, bytes_moved=bytes_moved)


def _call(
    x: Tensor, residual: Tensor | None, bias: bool, weight_dtype: torch.dtype | None, zero_centered: bool
) -> Call:
    hidden, device = x.shape[-1], str(x.device)
    parameter = partial(random_tensor, hidden, device=device, dtype=weight_dtype or x.dtype, size=0.2)
    weight = parameter(seed=2, shift=0.0 if zero_centered else 1.0)
    rows = (x,) if residual is None else (x, residual)
    shift = (parameter(seed=3),) if bias else ()
    return Call(arguments=(*rows, weight, *shift, _EPS, zero_centered))
