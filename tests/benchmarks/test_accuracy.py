import pytest
import torch

from megatron_ru.benchmarks.accuracy import accuracy, differentiable_outputs, exact_results, limit
from megatron_ru.benchmarks.peer import Prepared
from megatron_ru.ops.op import OPS, Call, Tolerance
from tests.benchmarks.conftest import make_op


def exact_of(op, dtype):
    call = op.cases[0].make("cpu", dtype)
    trial = call.copy()
    return call, exact_results(op, call, dtype, differentiable_outputs(op, trial, trial.run(op.function)))


def of_function(op, function, dtype=torch.bfloat16, **changes):
    call, exact = exact_of(op, dtype)
    return accuracy(op, call, Prepared(run=lambda: call.run(function), leaves=tuple(call.leaves()), **changes), exact)


def test_exact_results_are_float64_and_gradients_belong_to_random_upstream(square):
    call, exact = exact_of(square, torch.bfloat16)
    x = call.arguments[0].detach().double()
    assert exact.differentiable == (0,)
    torch.testing.assert_close(exact.outputs[0], x**2, rtol=0, atol=0)
    torch.testing.assert_close(exact.gradients[0], 2 * x * exact.upstream[0].double(), rtol=0, atol=0)
    assert exact.upstream[0].dtype is torch.bfloat16
    assert exact.upstream[0].unique().numel() == x.numel()


def test_right_result_is_half_an_ulp_away_at_most(square):
    found = of_function(square, square.function)
    assert found.good
    assert 0 < found.output < 2**-8
    assert found.ulps <= 0.5
    assert found.gradient < 2**-7


def test_error_is_relative_to_the_size_of_the_result(square):
    found = of_function(square, lambda x: 1.25 * x.float() ** 2)
    assert found.output == pytest.approx(0.25, rel=1e-6)
    assert found.gradient == pytest.approx(0.25, rel=1e-2)
    assert not found.good


def test_small_dtype_is_allowed_more(square):
    """A thousandth is less than a rounding of bf16, and many of fp32."""
    for dtype, good in ((torch.bfloat16, True), (torch.float32, False)):
        found = of_function(square, lambda x, dtype=dtype: (1.001 * x.float() ** 2).to(dtype), dtype)
        assert found.good is good


def test_limit_comes_from_the_op():
    bf16, fp32 = torch.bfloat16, torch.float32
    plain = Tolerance(ulps=1, wide=8, reason="fp32")
    rough = Tolerance(ulps=1, wide=8, rough=2, reason="logits are rounded")
    long = Tolerance(ulps=1, wide=1000, reason="long sums")
    assert limit(plain, fp32, bf16) == 1e-5
    assert limit(rough, fp32, bf16) == 2 * 2**-7
    assert limit(long, fp32, bf16) == pytest.approx(1000 * 2**-23)
    # fp32 throughout rounds nothing to bf16.
    assert limit(rough, fp32, fp32) == 1e-5
    # A few roundings of the result's own dtype are always allowed.
    assert limit(plain, bf16, bf16) == 2 * 2**-7


def test_rounding_of_logits_is_nobody_s_fault():
    """Losses in fp32 of logits in bf16: every way of computing them is far from the formula, and none is wrong."""

    def of_logits(x):
        return (x * x).float().log()

    def reference(x):
        return (x.double() ** 2).log()

    strict = make_op(function=of_logits, reference=reference)
    told = make_op(
        function=of_logits, reference=reference,
        tolerance=Tolerance(ulps=1, wide=8, rough=2, reason="the square is rounded to the dtype"),
    )  # fmt: skip
    found = of_function(strict, of_logits)
    assert (found.good, found.of_limit > 10) == (False, True)
    found = of_function(told, of_logits)
    assert (found.good, 0 < found.of_limit < 1) == (True, True)
    # Two per cent are more than that.
    assert not of_function(told, lambda x: 1.02 * of_logits(x)).good


def test_linear_cross_entropy_in_bf16_is_right():
    """The op that a run on a GPU called wrong, with everybody else's."""
    op = OPS["linear_cross_entropy"]
    call = op.samples[1].make("cpu", torch.bfloat16)
    exact = exact_results(op, call, torch.bfloat16, differentiable_outputs(op, call.copy(), call.run(op.plain)))
    for function in (op.function, op.plain):
        own = call.copy()
        prepared = Prepared(run=lambda own=own, function=function: own.run(function), leaves=tuple(own.leaves()))
        found = accuracy(op, own, prepared, exact)
        assert found.output > 1e-5
        assert found.good, found


def test_recorded_errors_are_within_the_limits():
    """What one H200 gave (2026-11-24) for each op timed beside others, the largest of all: output, gradient, dtype of
    the output."""
    recorded = {
        "activation": (2.6e-3, 2.4e-3, torch.bfloat16), "adamw": (1.3e-6, None, torch.float32),
        "add_layer_norm": (2.5e-3, 2.6e-3, torch.bfloat16), "add_rms_norm": (3.0e-3, 3.5e-3, torch.bfloat16),
        "cross_entropy": (9.5e-8, 1.5e-4, torch.float32), "glu": (2.5e-3, 2.5e-3, torch.bfloat16),
        "gradient_guard": (0.0, None, torch.float32), "layer_norm": (1.7e-3, 1.7e-3, torch.bfloat16),
        "linear_cross_entropy": (1.6e-4, 2.8e-3, torch.float32), "rms_norm": (1.7e-3, 1.8e-3, torch.bfloat16),
        "rope": (1.7e-3, 1.7e-3, torch.bfloat16),
        "vocab_parallel_cross_entropy": (3.5e-8, 4.3e-5, torch.float32),
    }  # fmt: skip
    assert set(recorded) == set(OPS) - {"rotary_qkv", "embedding_gradient"}
    for name, (output, gradient, dtype) in recorded.items():
        assert output <= limit(OPS[name].tolerance, dtype, torch.bfloat16), name
        assert (gradient or 0) <= limit(OPS[name].gradient_tolerance, torch.bfloat16, torch.bfloat16), name


def test_wrong_gradient_alone_is_noticed(square):
    found = of_function(square, lambda x: x.detach() ** 2 + (x - x.detach()))
    assert found.ulps <= 0.5
    assert found.gradient > 0.1
    assert not found.good


def test_nan_is_never_good(square):
    assert not of_function(square, lambda x: x * x * float("nan")).good


def test_other_layout_is_brought_back(square):
    call, exact = exact_of(square, torch.float32)
    turned = call.arguments[0].detach().t().contiguous().requires_grad_()

    def back(tensors):
        return tuple(tensor.t() for tensor in tensors)

    prepared = Prepared(
        run=lambda: turned * turned, leaves=(turned,),
        outputs_to_op=back, gradients_to_op=back, upstream_from_op=back,
    )  # fmt: skip
    assert accuracy(square, call, prepared, exact).good
    with pytest.raises(ValueError, match=r"the result has sizes \[3, 4\], expected \[4, 3\]"):
        accuracy(square, call, Prepared(run=lambda: turned * turned, leaves=(turned,), upstream_from_op=back), exact)


def test_scalar_gets_one_from_above():
    op = make_op(function=lambda x: (x * x).sum(), reference=lambda x: (x.double() ** 2).sum())
    _, exact = exact_of(op, torch.float32)
    assert exact.upstream[0].item() == 1.0


def test_library_that_gives_the_first_output_alone():
    """As linear cross entropies do that give no losses of single tokens."""
    op = make_op(
        function=lambda x: ((x * x).sum(), (x * x).detach()),
        reference=lambda x: ((x.double() ** 2).sum(), (x.double() ** 2).detach()),
    )
    found = of_function(op, lambda x: (x * x).sum(), torch.float32)
    assert found.good
    assert found.gradient < 1e-6


def test_op_that_works_in_place():
    def double_(x):
        x.mul_(2)
        return torch.ones(1, dtype=torch.int32)

    op = make_op(
        function=double_, plain=double_, reference=double_, differentiable=False,
        results=lambda call, flags: (flags, *call.tensors()),
    )  # fmt: skip
    values = torch.arange(6.0)
    call = Call(arguments=(values,))
    exact = exact_results(op, call, torch.float32, ())
    torch.testing.assert_close(exact.outputs[1], 2 * values.double())
    own = call.copy()
    assert accuracy(op, own, Prepared(run=lambda: own.run(double_), leaves=()), exact).good
    # Twice as much, and the flags are compared as they are.
    assert not accuracy(op, own, Prepared(run=lambda: own.run(double_), leaves=()), exact).good
