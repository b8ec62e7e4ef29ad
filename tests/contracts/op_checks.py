"""What every op is held to, on any device: used by test_ops.py on the CPU and by tests/gpu/test_ops_on_gpu.py."""

import dataclasses

import pytest
import torch

from megatron_ru.ops.op import OPS

# (op, sample, dtype): one test each.
CASES = [
    pytest.param(op, sample, dtype, id=f"{name}-{sample.label}-{str(dtype).removeprefix('torch.')}".replace(" ", "_"))
    for name, op in OPS.items()
    for sample in op.samples
    for dtype in sample.dtypes
]


def run_with_gradients(call, op, function):
    """(results, gradients of the leaves) for upstream gradients that are the same for every form of the op."""
    results = op.results(call, call.run(function))
    leaves = call.leaves()
    differentiable = [result for result in results if result.requires_grad]
    if not (op.differentiable and leaves and differentiable):
        return [result.detach() for result in results], []
    gradients = torch.autograd.grad(
        differentiable, leaves, [upstream(result, n) for n, result in enumerate(differentiable)]
    )
    return [result.detach() for result in results], list(gradients)


def upstream(result, number):
    """Numbers that every dtype holds exactly, of both signs and none zero; 1 for a scalar, as a loss has."""
    if result.dim() == 0:
        return torch.ones_like(result)
    steps = torch.arange(result.numel(), device=result.device).add(number).remainder(7).sub(3.5).div(2)
    return steps.reshape(result.shape).to(result.dtype)


def assert_near(found, exact, tolerance, sample, dtype, what):
    """Within the tolerance of the float64 value, and infinite or NaN where that is."""
    assert found.shape == exact.shape, what
    if not found.dtype.is_floating_point:
        assert torch.equal(found, exact), what
        return
    found_dtype = found.dtype
    found, exact = found.double(), exact.double()
    if exact.numel() and "outside" not in sample.label:
        assert exact.isfinite().any(), f"{what}: the formula itself gives {exact.flatten()[0]}"
    largest = torch.finfo(found_dtype).max
    # What lies beyond the dtype rounds to an infinity.
    beyond = exact.abs() > largest
    exact = torch.where(beyond, exact.sign() * float("inf"), exact)
    same = (found == exact) | (found.isnan() & exact.isnan())
    distance = torch.where(same, torch.zeros_like(found), (found - exact).abs())
    allowed = tolerance.allowed(exact, found_dtype, sample.scale, dtype)
    worst = (distance / allowed.clamp(min=1e-300)).nan_to_num(nan=float("inf"))
    bad = ~(same | (distance <= allowed))
    if bad.any():
        place = worst.flatten().argmax().item()
        pytest.fail(
            f"{what}: {int(bad.sum())} of {bad.numel()} numbers are off; at {place} {found.flatten()[place]:.9g}, "
            f"exact {exact.flatten()[place]:.9g}, {worst.flatten()[place]:.3g} times the tolerance ({tolerance.reason})"
        )


def check_against_formula(op, sample, dtype, device, function, tolerance, gradient_tolerance):
    """Results and gradients of one form of an op against the float64 formula."""
    call = sample.make(device, dtype)
    exact_call = sample.make(device, dtype).double()
    if op.differentiable:
        exact, exact_gradients = run_with_gradients(exact_call, op, op.reference)
    else:
        exact, exact_gradients = list(op.results(exact_call, exact_call.run(op.reference))), []
    leaves = [leaf.dtype for leaf in call.leaves()]
    results, gradients = run_with_gradients(call, op, function)
    assert len(results) == len(exact)
    for number, (found, wanted) in enumerate(zip(results, exact, strict=True)):
        assert_near(found, wanted, tolerance, sample, dtype, f"result {number}")
    if not sample.gradients:
        return
    assert len(gradients) == len(exact_gradients)
    for number, (found, wanted) in enumerate(zip(gradients, exact_gradients, strict=True)):
        assert found.dtype == leaves[number]
        wider = dataclasses.replace(gradient_tolerance, ulps=gradient_tolerance.ulps + sample.gradient_ulps)
        assert_near(found, wanted, wider, sample, dtype, f"gradient {number}")


def bits(tensors):
    """The tensors as whole numbers, so that NaNs compare."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [tensor.contiguous().view(whole[tensor.element_size()]).cpu() for tensor in tensors]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(bits(first), bits(second), strict=True))
