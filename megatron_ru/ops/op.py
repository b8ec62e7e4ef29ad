"""The record of a fused op: what it computes, how exactly, on which inputs, and how many bytes it has to move.

Tests and benchmarks walk `OPS`; an op appears there by registering itself in its own file. How they are used:

    for name, op in OPS.items():
        for case in op.cases:
            call = case.make("cuda", torch.bfloat16)     # tensors that need gradients require them
            output = call.run(op.function)               # the public function: fused where `op.switch` is on
            output = call.run(op.plain)                  # the plain torch form, same arguments, same results
            exact = call.double().run(op.reference)      # the formula in float64
            compared = op.results(call, output)          # a tuple of tensors, also of ops that work in place
            forward, backward = case.bytes_moved(torch.bfloat16)

An op that is not `differentiable` works in place on its arguments: `call.copy()` gives it tensors of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ru.foundation.registry import Registry

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF)


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one call, in the order of the op's public function."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any]) -> Any:
        """What `function` gives for these arguments."""
        return function(*self.arguments, **self.keywords)

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are asked for, in the order of the arguments."""
        return [leaf for leaf in self.tensors() if leaf.requires_grad]

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments; lists of them are opened."""
        return list(_tensors((*self.arguments, *self.keywords.values())))

    def copy(self) -> "Call":
        """The same call on tensors of its own, strides kept, none of them part of a graph."""
        return self.map(_copy)

    def double(self) -> "Call":
        """The same call on float64 copies of its floating tensors."""
        return self.map(
            lambda leaf: (
                _copy(leaf).double().detach().requires_grad_(leaf.requires_grad)
                if leaf.is_floating_point()
                else leaf.clone()
            )
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same call with `change` applied to each tensor; one that stands twice stays one."""
        known: dict[int, Tensor] = {}

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in known:
                    known[id(value)] = change(value)
                return known[id(value)]
            if isinstance(value, (list, tuple)):
                return type(value)(changed(item) for item in value)
            return value

        return Call(
            arguments=tuple(changed(value) for value in self.arguments),
            keywords={name: changed(value) for name, value in self.keywords.items()},
        )


# Makes the arguments on a device and in a dtype, the same each time.
Make = Callable[[str, torch.dtype], Call]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A small input that tests go through: odd sizes, strides, extreme values."""

    label: str
    make: Make
    dtypes: tuple[torch.dtype, ...] = FLOATS
    scale: float | None = None
    """Size of the numbers that cancel inside, where the result does not show it; default: its largest entry."""
    gradients: bool = True
    """Whether gradients are compared too."""
    gradient_ulps: float = 0.0
    """Ulps that gradients may be off further, where they are rounded a second time."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkCase:
    """A size that is timed."""

    label: str
    """The shape in words: `8192x4096`."""
    make: Make
    bytes_moved: Callable[[torch.dtype], tuple[int, int]]
    """(forward, backward): the fewest bytes that can pass through memory, statistics and weights left out."""
    dtype: torch.dtype = torch.bfloat16
    """The dtype that is timed unless another is asked for."""
    flops: int = 0
    """Multiplications and additions of forward and backward together, where matrix products dominate; else 0."""
    function: Callable[..., Any] | None = None
    """What is timed in place of the op's public function, with the same arguments."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a result may lie from the float64 formula: `ulps` of the result's dtype at the exact value, plus `wide`
    fp32 (beside float64: float64) epsilons of the largest number that takes part, plus `rough` epsilons of the
    inputs' dtype times that number.

    Half an ulp is a correct rounding; the fp32 arithmetic before it is allowed for by `wide`; `rough` allows for
    numbers that are rounded to the dtype on the way.
    """

    ulps: float
    wide: float
    rough: float = 0.0
    reason: str

    def allowed(
        self, exact: Tensor, dtype: torch.dtype, scale: float | None = None, inputs: torch.dtype | None = None
    ) -> Tensor:
        """The allowed distance from each value of `exact` (float64) for a result in `dtype`, where the inputs, and what
        is rounded on the way, are of dtype `inputs`."""
        finite = exact.abs().nan_to_num(nan=0.0, posinf=0.0)
        largest = max(scale or 0.0, finite.max().item() if finite.numel() else 0.0)
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        smallest = wide.smallest_normal * wide.eps
        spread = max(self.wide * wide.eps * largest, smallest) + self.rough * torch.finfo(inputs or dtype).eps * largest
        return self.ulps * ulp(finite, dtype) + spread


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours in `dtype` at each of `values` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def outputs(call: Call, output: Any) -> tuple[Tensor, ...]:
    """The tensors that a function gave back, those that are None left out."""
    return tuple(_tensors((output,)))


@dataclass(frozen=True, kw_only=True)
class Op:
    """One public function of an op file."""

    name: str
    switch: str
    """The word of `--ru-ops` that turns it on; several functions may share one."""
    summary: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    """The same in plain torch: differentiable, any device."""
    reference: Callable[..., Any]
    """The same by the formula, for float64 arguments."""
    samples: tuple[Sample, ...]
    cases: tuple[BenchmarkCase, ...]
    tolerance: Tolerance
    """Of what the function returns."""
    gradient_tolerance: Tolerance
    """Of gradients of the leaves."""
    plain_tolerance: Tolerance
    """Of both for the plain form, which may round between its steps."""
    torch_ops: tuple[str, ...]
    """The compiled operators behind it, in the namespace `megatron_ru`."""
    differentiable: bool = True
    results: Callable[[Call, Any], tuple[Tensor, ...]] = outputs


OPS: Registry[Op] = Registry("op", package="megatron_ru.ops")


def register(op: Op) -> Op:
    """Adds an op to `OPS` under its name."""
    return OPS.register(op.name)(op)


def random_tensor(
    *shape: int,
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    size: float = 1.0,
    shift: float = 0.0,
    leaf: bool = True,
) -> Tensor:
    """Normal numbers times `size` plus `shift`; made in fp32 on the CPU, so that every device gets the same ones.

    Beyond a million elements they are made on the device. With `leaf` the tensor requires gradients.
    """
    large = torch.Size(shape).numel() > 1_000_000
    generator = torch.Generator(device if large else "cpu").manual_seed(seed)
    made = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return made.mul_(size).add_(shift).to(device=device, dtype=dtype).requires_grad_(leaf)


def _copy(leaf: Tensor) -> Tensor:
    """A tensor with the same values and strides that belongs to no graph; gradients are asked for as of `leaf`.

    Gaps between rows are kept: an op must not look at them, and must not write there.
    """
    with torch.no_grad():
        if leaf.is_contiguous() or leaf.numel() == 0:
            made = leaf.detach().clone()
        elif any(stride == 0 for stride in leaf.stride()):
            made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            base = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in leaf.stride())
            made[base].copy_(leaf[base])
        else:
            made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            made.copy_(leaf)
    return made.requires_grad_(leaf.requires_grad)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
