"""The guard that lets a run survive a NaN: a gradient that holds one becomes zero."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ru.ops.backend import switch
from megatron_ru.ops.library import operator
from megatron_ru.ops.op import BenchmarkCase, Call, Op, Sample, Tolerance, random_tensor, register

SWITCH = switch("gradient_guard")
_fused = operator("zero_nonfinite_")


def zero_nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """int32 [len(tensors)]: 1 where a tensor held a NaN or an infinity and has become zero, 0 where it is untouched.

    tensors: fp32, fp16 or bf16 on one device, changed in place. A clean tensor is read once and not written. The host
    does not wait for a GPU: sum the flags on the device, and look at them when the numbers of a step are read.
    """
    if tensors and SWITCH.takes(tensors[0]):
        first = tensors[0]
        if all(t.is_contiguous() and t.device == first.device and SWITCH.takes(t) for t in tensors):
            with torch.no_grad():
                return _fused(list(tensors))
        SWITCH.fell_back(first, "a tensor of the list is not contiguous, or not of one device")
    elif tensors:
        SWITCH.fell_back(tensors[0])
    return zero_nonfinite_plain(tensors)


@torch.no_grad()
def zero_nonfinite_plain(tensors: Sequence[Tensor]) -> Tensor:
    """The same in plain torch."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int32)
    flags = [~torch.isfinite(tensor).all() for tensor in tensors]
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.masked_fill_(flag, 0)
    return torch.stack(flags).to(torch.int32)


def zero_nonfinite_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The same, number by number where it matters, for tests: a sum is finite exactly when its terms are, divided
    so that they cannot overflow together."""
    flags = []
    for tensor in tensors:
        bad = bool((tensor != tensor).any()) or bool((tensor.abs() == float("inf")).any())
        if bad:
            tensor.zero_()
        flags.append(int(bad))
    return torch.tensor(flags, dtype=torch.int32, device=tensors[0].device if tensors else None)


def _results(call: Call, flags: Tensor) -> tuple[Tensor, ...]:
    return (flags, *call.tensors())


def _sample(label: str, sizes: tuple[tuple[int, ...], ...], bad: dict[int, tuple[int, float]]) -> Sample:
    """Tensors of `sizes`; `bad` puts a value at a place of some of them."""

    def make(device: str, dtype: torch.dtype) -> Call:
        tensors = [
            random_tensor(*size, device=device, dtype=dtype, seed=number, leaf=False)
            for number, size in enumerate(sizes)
        ]
        for number, (place, value) in bad.items():
            tensors[number].view(-1)[place] = value
        return Call(arguments=(tensors,))

    return Sample(label=label, make=make, gradients=False)


def _case(elements: int, tensors: int) -> BenchmarkCase:
    def make(device: str, dtype: torch.dtype) -> Call:
        return Call(
            arguments=(
                [random_tensor(elements // tensors, device=device, dtype=dtype, leaf=False) for _ in range(tensors)],
            )
        )

    def bytes_moved(dtype: torch.dtype) -> tuple[int, int]:
        return elements * dtype.itemsize, 0

    label = f"{elements // 2**20}M in {tensors} tensor{'s' * (tensors > 1)}"
    return BenchmarkCase(label=label, make=make, bytes_moved=bytes_moved, dtype=torch.float32)


_NAN, _INF = float("nan"), float("inf")
# The largest numbers are finite, though their sum is not.
_LARGE = dict.fromkeys(range(2), (0, 65504.0))

register(
    Op(
        name="gradient_guard",
        switch="gradient_guard",
        summary="zeroes a gradient that holds a NaN or an infinity, and says so",
        function=zero_nonfinite,
        plain=zero_nonfinite_plain,
        reference=zero_nonfinite_reference,
        samples=(
            _sample("clean", ((7,), (3, 5), (1,)), {}),
            _sample("NaN at the end", ((1000,), (33, 7), (4,)), {1: (230, _NAN)}),
            _sample("infinities at both ends", ((1,), (4099,), (8,)), {0: (0, -_INF), 1: (4098, _INF)}),
            _sample("every tensor", ((5,), (6,)), {0: (2, _NAN), 1: (3, _NAN)}),
            _sample("empty tensors among them", ((0,), (9,), (0, 4)), {1: (8, _INF)}),
            _sample("large numbers", ((70_001,), (2,)), _LARGE),
        ),
        cases=(_case(256 * 2**20, 1), _case(256 * 2**20, 256)),
        tolerance=Tolerance(ulps=0, wide=0, reason="nothing is computed: numbers stay or become zero"),
        gradient_tolerance=Tolerance(ulps=0, wide=0, reason="there is no gradient"),
        plain_tolerance=Tolerance(ulps=0, wide=0, reason="nothing is computed: numbers stay or become zero"),
        torch_ops=("zero_nonfinite_",),
        differentiable=False,
        results=_results,
    )
)
