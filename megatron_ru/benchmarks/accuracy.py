"""How far results lie from the formula in float64."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ru.benchmarks.peer import Prepared
from megatron_ru.benchmarks.result import Accuracy
from megatron_ru.ops.op import Call, Op, Tolerance, outputs, ulp

# Results are looked at in pieces, so that a large one does not need its float64 copy beside it.
_PIECE = 2**25
# Epsilons of a result's dtype that ‖result - exact‖ / ‖exact‖ may reach whatever the op says: a correct rounding gives
# about 0.2, several in a row, as a library may do them, not much more than 1. Below, what fp32 sums over long rows and
# tables of angles may cost.
_EPSILONS = 2.0
_LEAST = 1e-5


@dataclass(frozen=True, kw_only=True)
class Exact:
    """What a call should give."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    """The gradients of the outputs with which `gradients` were computed; in the dtype of the case."""
    differentiable: tuple[int, ...]
    """Which outputs these belong to."""
    inputs: torch.dtype
    """The dtype of the case: what is rounded on the way is rounded to it."""


def exact_results(op: Op, call: Call, dtype: torch.dtype, differentiable: Sequence[int]) -> Exact:
    """The formula's results and gradients in float64, on tensors of their own.

    `differentiable` numbers the outputs that have a gradient; what comes from above is drawn at random, and 1 for a
    scalar.
    """
    wide = call.double()
    found = op.results(wide, wide.run(op.reference))
    upstream = tuple(_upstream(found[number], dtype, number) for number in differentiable)
    gradients: tuple[Tensor, ...] = ()
    leaves = wide.leaves()
    if upstream and leaves:
        heads = [found[number] for number in differentiable]
        gradients = torch.autograd.grad(heads, leaves, [one.double() for one in upstream])
    return Exact(
        outputs=tuple(tensor.detach() for tensor in found),
        gradients=gradients,
        upstream=upstream,
        differentiable=tuple(differentiable),
        inputs=dtype,
    )


def differentiable_outputs(op: Op, call: Call, output: object) -> tuple[int, ...]:
    """The numbers of the outputs that have a gradient."""
    if not op.differentiable:
        return ()
    return tuple(number for number, tensor in enumerate(op.results(call, output)) if tensor.requires_grad)


def accuracy(op: Op, call: Call, prepared: Prepared, exact: Exact) -> Accuracy:
    """The distance of one run of `prepared` from `exact`."""
    raw = prepared.run()
    found = op.results(call, raw) if not op.differentiable else prepared.outputs_to_op(outputs(call, raw))
    distances = [_distance(*pair, op.tolerance, exact.inputs) for pair in zip(found, exact.outputs, strict=False)]
    gradients = []
    if exact.gradients:
        heads, upstream = heads_and_upstream(call, raw, prepared, exact)
        given = prepared.gradients_to_op(torch.autograd.grad(heads, prepared.leaves, upstream))
        gradients = [
            _distance(*pair, op.gradient_tolerance, exact.inputs) for pair in zip(given, exact.gradients, strict=True)
        ]
    return Accuracy(
        output=max(one.relative for one in distances),
        ulps=max(one.ulps for one in distances),
        gradient=max((one.relative for one in gradients), default=None),
        gradient_ulps=max((one.ulps for one in gradients), default=None),
        of_limit=_largest(one.of_limit for one in (*distances, *gradients)),
        good=all(one.good for one in (*distances, *gradients)),
    )


def limit(tolerance: Tolerance, result: torch.dtype, inputs: torch.dtype) -> float:
    """What ‖result - exact‖ / ‖exact‖ may reach for a result of dtype `result` where the op's inputs are `inputs`.

    The op's tolerance names entry by entry what rounding costs. Beside the size of a whole tensor that is: its fp32
    epsilons, and its `rough` epsilons of the inputs' dtype where the op rounds on the way, as a linear cross entropy
    rounds its logits though its losses are fp32. Nobody is held to less than a few roundings of his own result.
    """
    wide = torch.finfo(torch.float32).eps
    return max(
        _EPSILONS * torch.finfo(result).eps,
        tolerance.rough * torch.finfo(inputs).eps,
        tolerance.wide * wide,
        _LEAST,
    )


def heads_and_upstream(call: Call, raw: object, prepared: Prepared, exact: Exact) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a run that have gradients, and what comes to them from above, in their layout and dtype."""
    heads = [tensor for tensor in outputs(call, raw) if tensor.requires_grad]
    given = prepared.upstream_from_op(exact.upstream)
    # A library that gives the loss alone has fewer outputs. Copies, because some write their gradients over what they
    # are given, and the next contender is held against the same numbers.
    return heads, [one.to(head.dtype, copy=True) for head, one in zip(heads, given, strict=False)]


@dataclass(frozen=True, kw_only=True)
class _Distance:
    relative: float
    ulps: float
    of_limit: float
    good: bool


def _distance(found: Tensor, exact: Tensor, tolerance: Tolerance, inputs: torch.dtype) -> _Distance:
    if found.shape != exact.shape:
        raise ValueError(f"the result has sizes {list(found.shape)}, expected {list(exact.shape)}")
    if not found.dtype.is_floating_point:
        equal = bool(torch.equal(found.double(), exact.double()))
        wrong = 0.0 if equal else float("inf")
        return _Distance(relative=0.0 if equal else 1.0, ulps=wrong, of_limit=wrong, good=equal)
    size = float(sum(piece.square().sum() for _, piece in _pieces(found, exact))) ** 0.5
    typical = size / max(1, exact.numel()) ** 0.5
    squares = worst = 0.0
    for piece, right in _pieces(found, exact):
        error = (piece - right).abs()
        squares += float(error.square().sum())
        # Beside zero any error is many ulps; what counts is its size beside that of the other entries.
        unit = ulp(right.abs().clamp(min=typical), found.dtype)
        worst = max(worst, float((error / unit).max()) if error.numel() else 0.0)
    relative = squares**0.5 / size if size else squares**0.5
    of_limit = relative / limit(tolerance, found.dtype, inputs)
    # A NaN is never within a limit.
    return _Distance(relative=relative, ulps=worst, of_limit=of_limit, good=of_limit <= 1)


def _largest(values: Iterable[float]) -> float:
    """The largest, NaN where there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _pieces(found: Tensor, exact: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat, right = found.detach().reshape(-1), exact.detach().reshape(-1)
    for begin in range(0, max(1, flat.numel()), _PIECE):
        yield flat[begin : begin + _PIECE].double(), right[begin : begin + _PIECE].double()


def _upstream(output: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    if output.dim() == 0:
        return torch.ones((), dtype=dtype, device=output.device)
    generator = torch.Generator(output.device).manual_seed(1000 + seed)
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32).to(dtype)
