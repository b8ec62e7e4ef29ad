from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from megatron_ru.benchmarks.contest import SharedInputError, arena, compete, input_sets
from megatron_ru.benchmarks.peer import Prepared, UnsupportedError
from megatron_ru.benchmarks.timing import WallClock
from tests.benchmarks.conftest import make_op


def place_of(op, seconds=0.003):
    return arena(op, op.cases[0], torch.float32, "cpu", WallClock(), seconds, cache_bytes=0)


def prepare_with(function):
    return lambda call: Prepared(run=lambda: call.run(function), leaves=tuple(call.leaves()))


def test_row_has_times_bytes_and_accuracy(square):
    row = compete(place_of(square), "ours", prepare_with(square.function))
    assert (row.op, row.case, row.dtype, row.contender) == ("square", "4x3", "float32", "ours")
    assert (row.status, row.note, row.timed) == ("ok", "", "wall clock")
    assert (row.bytes_forward, row.bytes_backward) == (96, 144)
    assert 0 < row.forward.microseconds < row.both.microseconds
    assert row.backward.microseconds > 0
    assert row.accuracy.good
    assert (row.host_microseconds, row.extra_bytes) == (None, None)


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (RuntimeError("no kernel\nfor this"), "failed", "RuntimeError: no kernel"),
        (ImportError(), "failed", "ImportError"),
        (UnsupportedError("has no offset"), "unsupported", "has no offset"),
    ],
)
def test_contender_that_fails_is_reported_and_the_run_goes_on(square, error, status, note):
    def prepare(call):
        raise error

    row = compete(place_of(square), "theirs", prepare)
    assert (row.status, row.note, row.both) == (status, note, None)
    assert not row.counts


def test_failure_in_the_backward_is_reported_too(square):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no backward here")

    row = compete(place_of(square), "theirs", prepare_with(Broken.apply))
    assert (row.status, row.note) == ("failed", "ValueError: no backward here")


def test_wrong_contender_is_timed_and_does_not_count(square):
    row = compete(place_of(square), "theirs", prepare_with(lambda x: 2 * x * x))
    assert row.status == "ok"
    assert "wrong beyond what its op and dtypes account for" in row.note
    assert row.both.microseconds > 0
    assert not row.counts


def test_graph_that_can_run_backward_once_is_enough(square):
    """One-pass cross entropy and what writes gradients over its inputs allow no second backward."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.gradient = 2 * x
            return x * x

        @staticmethod
        def backward(ctx, upstream):
            gradient, ctx.gradient = ctx.gradient, None
            return gradient * upstream

    row = compete(place_of(square), "theirs", prepare_with(Once.apply))
    assert row.status == "ok", row.note
    assert row.accuracy.good


class Over(torch.autograd.Function):
    """x · x, whose backward writes the gradient over x, as an activation in place does."""

    seen: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        Over.seen.append(float(x.detach().sum()))
        return x.detach().mul_(2 * upstream)


def test_backward_over_its_input_asks_for_one_graph(square):
    with pytest.raises(SharedInputError, match="modified by an inplace operation"):
        compete(place_of(square), "ours", prepare_with(Over.apply))


def test_backward_over_another_saved_tensor_asks_for_one_graph_too(square):
    table = torch.ones(4, 3)

    class OverTable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, table)
            return x * x

        @staticmethod
        def backward(ctx, upstream):
            x, table = ctx.saved_tensors
            table.mul_(1)
            return 2 * x * upstream

    with pytest.raises(SharedInputError, match="modified by an inplace operation"):
        compete(place_of(square), "ours", prepare_with(OverTable.apply))


def test_backward_over_its_input_is_timed_with_one_graph_for_each_set(square):
    place = replace(place_of(square), one_graph=True)
    before = place.call.arguments[0].detach().clone()
    Over.seen.clear()
    row = compete(place, "ours", prepare_with(Over.apply))
    assert (row.status, row.note) == ("ok", "one graph for each input set, since a backward writes over it")
    assert row.accuracy.good
    # No more than one for each of the two sets.
    assert row.backward.iterations == 2
    assert row.both.microseconds > row.forward.microseconds > 0
    assert torch.equal(place.call.arguments[0].detach(), before)
    # The inputs are put back before they are used again: with the backwards in turn they would shrink or grow.
    fresh = float(before.sum())
    assert Over.seen.count(fresh) > len(Over.seen) / (2 * row.both.iterations)
    # Everybody else in the case is timed in the same way.
    assert compete(place, "theirs", prepare_with(square.function)).backward.iterations == 2


def test_inputs_that_are_written_over_do_not_spoil_another_contender_s():
    def over(x):
        with torch.no_grad():
            result = x * x
            x.zero_()
        return result.requires_grad_()

    op = make_op()
    place = place_of(op)
    before = place.call.arguments[0].detach().clone()
    compete(place, "theirs", prepare_with(over))
    torch.testing.assert_close(place.call.arguments[0].detach(), before, rtol=0, atol=0)
    assert compete(place, "ours", prepare_with(op.function)).accuracy.good


def test_op_without_gradients_has_a_forward_alone():
    def twice_(x):
        with torch.no_grad():
            x.mul_(2)

    op = make_op(
        function=twice_, plain=twice_, reference=lambda x: x.detach().mul_(2), differentiable=False,
        results=lambda call, output: tuple(call.tensors()),
    )  # fmt: skip
    row = compete(place_of(op), "ours", prepare_with(twice_))
    assert row.status == "ok", row.note
    assert row.accuracy.good
    assert (row.backward, row.both) == (None, None)
    assert row.whole() == row.forward


def test_what_is_timed_may_stand_in_for_the_function(square):
    calls = []

    def prepare(call):
        return Prepared(run=lambda: calls.append(1) or call.run(square.function), leaves=tuple(call.leaves()))

    row = compete(place_of(square), "ours", prepare)
    assert len(calls) > row.forward.repeats * row.forward.iterations


def test_input_sets_outgrow_the_cache():
    mib = 2**20
    # 60 MiB of cache: four times that, and one set at each end of the turn.
    assert input_sets(60 * mib, 80 * mib) == 5
    assert input_sets(60 * mib, 4000 * mib) == 2
    assert input_sets(60 * mib, 1000) == 12
    assert input_sets(0, 1000) == 2
