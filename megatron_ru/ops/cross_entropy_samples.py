"""What the cross entropies are tested and timed on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ru.ops.op import FLOATS, BenchmarkCase, Call, Sample, Tolerance, random_tensor

TOLERANCE = Tolerance(
    ulps=1,
    wide=16,
    reason="fp32 losses: a sum of exponentials in blocks, a logarithm, and a difference of numbers of the logits' size",
)
GRADIENT_TOLERANCE = Tolerance(
    ulps=0.5,
    wide=16,
    reason="exp(x - lse) carries the fp32 error of lse; rounded once to the dtype of the logits",
)
PLAIN_TOLERANCE = Tolerance(ulps=1, wide=32, reason="the same arithmetic in fp32, rounded once")

_IGNORE = -100


def samples() -> tuple[Sample, ...]:
    """Odd sizes, strides, settings and extreme values."""
    both: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
    return (
        _sample("one row of one column", (1,), 1, scale=4),
        # No vector width divides 37 or 5003, which is longer than what a block of threads reads at once.
        _sample("odd", (5, 3), 37),
        _sample("longer than a block", (3,), 5003),
        _sample("many rows", (600,), 11),
        _sample("no rows", (0, 2), 7),
        _sample("label smoothing", (4, 2), 50, label_smoothing=0.1),
        _sample("z-loss", (4, 2), 50, z_loss=1e-2),
        _sample("both", (9,), 130, **both),
        _sample("both, mean", (9,), 130, reduction="mean", **both),
        _sample("sum", (9,), 130, reduction="sum"),
        _sample("mean of those that count", (4, 5), 33, ignored=(1, 7, 19), reduction="mean"),
        # More rows than blocks or threads look at one by one.
        _sample("mean of thousands", (5000,), 11, ignored=(1, 7, 19), reduction="mean"),
        _sample(
            "thousands of rows, each multiplied again",
            (5000,),
            11,
            expected=lambda: torch.linspace(0.5, 2, 5000),
            gradient_ulps=1,
        ),
        _sample("ignored targets", (4, 5), 33, ignored=(0, 8), **both),
        _sample("ignored id inside the vocabulary", (12,), 5, ignore_index=3, **both),
        _sample("two passes", (6,), 100, one_pass=False),
        # The backward brings another factor than was expected: what was rounded is multiplied, and rounded again.
        _sample("one pass, nothing expected", (6,), 100, one_pass=True, gradient_ulps=1),
        _sample(
            "expected gradient of each row", (6,), 100, expected=lambda: torch.linspace(0.5, 2, 6), gradient_ulps=1
        ),
        _sample(
            "expected gradient of all",
            (2, 3),
            100,
            expected=lambda: torch.tensor(3.0),
            reduction="mean",
            gradient_ulps=1,
        ),
        _sample("columns of padded rows", (7,), 30, wider=6, **both),
        _sample("padded rows over the logits", (7,), 30, wider=6, in_place=True, reduction="mean"),
        _sample("gradient over the logits, two passes", (2, 4), 64, in_place=True, **both),
        _sample("int32 targets", (6,), 20, target_dtype=torch.int32),
        _sample("target outside the vocabulary", (4,), 20, outside=True),
        _sample("target outside the vocabulary, both", (4,), 20, outside=True, one_pass=True, gradient_ulps=1, **both),
        # exp of these would overflow, or vanish, without the largest subtracted.
        _sample("large", (5,), 90, size=1e4, scale=5e4),
        _sample(
            "largest fp16",
            (3,),
            40,
            size=4e4,
            dtypes=(torch.float16,),
            change=lambda x: x.clamp(-65504, 65504),
            scale=2e5,
        ),
        _sample("far from zero", (3,), 40, shift=300.0, scale=300.0),
        _sample("all equal", (3,), 40, size=0.0, shift=2.0),
        _sample("denormal", (3,), 40, size=1e-39, dtypes=(torch.float32, torch.bfloat16)),
        _sample("-inf beside the target", (6,), 40, change=lambda x: x.masked_fill(x > 1, float("-inf")), keep=True),
        _sample("one finite logit", (2,), 9, change=lambda x: x.masked_fill(x < 10, float("-inf")), keep=True, scale=4),
    )


def parallel_samples() -> tuple[Sample, ...]:
    """The same for one rank alone; several are tested in processes of their own."""
    parallel: dict[str, Any] = {"group": True}
    both: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, **parallel}
    return (
        _sample("one row of one column", (1,), 1, scale=4, **parallel),
        _sample("odd", (5, 3), 37, **parallel),
        _sample("longer than a block", (3,), 5003, **both),
        _sample("no rows", (0, 2), 7, **parallel),
        _sample("ignored targets", (4, 5), 33, ignored=(0, 8), **both),
        _sample("columns of padded rows", (7,), 30, wider=6, **both),
        _sample("gradient over the logits", (2, 4), 64, in_place=True, **both),
        _sample("target outside the vocabulary", (4,), 20, outside=True, **both),
        _sample("large", (5,), 90, size=1e4, scale=5e4, **parallel),
        _sample(
            "-inf beside the target", (6,), 40, change=lambda x: x.masked_fill(x > 1, float("-inf")), keep=True,
            **parallel,
        ),
    )  # fmt: skip


def cases() -> tuple[BenchmarkCase, ...]:
    """One pass with a mean, as training on one rank has it: 4 bytes for each bf16 logit."""
    return tuple(_case(tokens, vocab, parallel=False) for tokens in (8192, 16384) for vocab in (40000, 128256))


def parallel_cases() -> tuple[BenchmarkCase, ...]:
    """The local work of one rank: 2 bytes for each bf16 logit in the forward, 4 in the backward."""
    return tuple(_case(tokens, vocab, parallel=True) for tokens in (8192, 16384) for vocab in (40000, 128256))


def _sample(
    label: str,
    rows: tuple[int, ...],
    vocab: int,
    *,
    size: float = 3.0,
    shift: float = 0.0,
    wider: int = 0,
    ignored: tuple[int, ...] = (),
    outside: bool = False,
    keep: bool = False,
    change: Callable[[Tensor], Tensor] = lambda x: x,
    expected: Callable[[], Tensor] | None = None,
    target_dtype: torch.dtype = torch.int64,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    scale: float | None = None,
    gradient_ulps: float = 0.0,
    group: bool = False,
    **keywords: Any,
) -> Sample:
    """`wider` columns lie beyond the vocabulary; `keep` leaves the target's logit finite after `change`."""

    def make(device: str, dtype: torch.dtype) -> Call:
        base = random_tensor(*rows, vocab + wider, device=device, dtype=dtype, size=size, shift=shift, leaf=False)
        logits = base[..., :vocab]
        count = torch.Size(rows).numel()
        target = torch.arange(count, dtype=torch.int64).mul_(7919).remainder_(vocab).reshape(rows).to(device)
        if not (wider or size == 0):
            changed = change(logits)
            if keep:
                changed = changed.scatter(-1, target.unsqueeze(-1), torch.ones_like(changed))
            logits = changed
        flat = target.view(-1)
        for place in ignored:
            flat[place] = _IGNORE
        if outside:
            flat[0], flat[count - 1] = vocab, -1
        logits = logits.detach().requires_grad_()
        settings = dict(keywords)
        if expected is not None:
            settings["expected_gradient"] = expected().to(device)
        arguments = (logits, target.to(target_dtype), *((None,) if group else ()))
        return Call(arguments=arguments, keywords=settings)

    return Sample(label=label, make=make, dtypes=dtypes, scale=scale, gradient_ulps=gradient_ulps)


def _case(tokens: int, vocab: int, *, parallel: bool) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        logits = random_tensor(tokens, vocab, device=device, dtype=dtype)
        target = torch.arange(tokens, device=device).mul_(7919).remainder_(vocab)
        return (
            Call(arguments=(logits, target, None))
            if parallel
            else Call(arguments=(logits, target), keywords={"reduction": "mean"})
        )

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        tensor = tokens * vocab * dtype.itemsize
        return (tensor, 2 * tensor) if parallel else (2 * tensor, 0)

    return BenchmarkCase(label=f"{tokens}x{vocab}", make=make, bytes_moved=bytes_moved)
