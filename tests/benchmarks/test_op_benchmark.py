import json
from dataclasses import replace

import pytest
import torch

from megatron_ru.benchmarks import op_benchmark
from megatron_ru.benchmarks.op_benchmark import Settings, chosen, entries, in_turn, run
from megatron_ru.benchmarks.peer import PEERS, Peer, Prepared
from megatron_ru.benchmarks.report import write_json
from megatron_ru.benchmarks.result import OURS
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.registry import Registry
from megatron_ru.ops.op import OPS, BenchmarkCase
from tests.benchmarks.conftest import make_op
from tests.benchmarks.test_contest import Over


@pytest.fixture
def ops(monkeypatch):
    """A registry of two ops of a few numbers."""
    registry = Registry("op")
    first = make_op(
        "cube", function=lambda x: x * x * x, plain=lambda x: x * x * x, reference=lambda x: x.double() ** 3
    )
    second = make_op("square")
    large = make_op("square", rows=64, columns=5).cases
    second = make_op("square", cases=(*large, *second.cases))
    for op in (first, second):
        registry.register(op.name)(op)
    monkeypatch.setattr(op_benchmark, "OPS", registry)
    monkeypatch.setattr(op_benchmark, "copy_ceiling", lambda device: 10.0)
    monkeypatch.setattr(op_benchmark, "keep_memory", lambda: True)
    return registry


@pytest.fixture
def failing(monkeypatch):
    """A peer that has one op, and fails on it."""

    def adapter(x):
        def fail():
            raise RuntimeError("invalid device function")

        return Prepared(run=fail, leaves=(x,))

    peer = Peer(
        name="failing", title="Failing", module="json", distribution="torch", summary="", needs_cuda=False,
        adapters={"square": {"": adapter, "in place": adapter}},
    )  # fmt: skip
    registry = Registry("peer")
    registry.register("failing")(peer)
    registry.register("torch")(PEERS["torch"])
    registry.register("absent")(
        Peer(name="absent", title="Absent", module="no_such_library", distribution="x", summary="", needs_cuda=False)
    )
    monkeypatch.setattr(op_benchmark, "PEERS", registry)
    return peer


def settings(**changes):
    return Settings(**{"device": "cpu", "seconds": 0.003, **changes})


def test_whole_run(ops, failing, tmp_path):
    written = []
    report = run(settings(against=("torch", "failing", "absent")), written.append)
    found = {(row.op, row.case, row.contender): row for row in report.rows}
    # On a CPU the smaller case of an op.
    assert set(found) == {
        ("cube", "4x3", OURS), ("cube", "4x3", "torch"), ("square", "4x3", OURS), ("square", "4x3", "torch"),
        ("square", "4x3", "Failing"), ("square", "4x3", "Failing, in place"),
    }  # fmt: skip
    assert found["square", "4x3", OURS].accuracy.good
    assert found["square", "4x3", "Failing"].note == "RuntimeError: invalid device function"
    assert report.peers["absent"] == "not installed"
    assert report.peers["torch"].startswith("2.")
    assert report.ceiling == 10.0
    assert report.environment["torch"] == torch.__version__
    assert int(report.environment["threads"]) == torch.get_num_threads()
    # After each case there is something to keep.
    assert [len(one.rows) for one in written] == [2, 6]
    write_json(report, tmp_path / "ops.json")
    stored = json.loads((tmp_path / "ops.json").read_text())
    assert [row["contender"] for row in stored["rows"]] == [row.contender for row in report.rows]


def test_sizes_and_names_choose_cases(ops):
    def labels(**changes):
        return [f"{op.name} {case.label}" for op, case in chosen(settings(**changes))]

    assert labels() == ["cube 4x3", "square 4x3"]
    assert labels(tokens=(4, 64)) == ["cube 4x3", "square 64x5", "square 4x3"]
    assert labels(tokens=(64,)) == ["square 64x5"]
    assert labels(hidden=(3,)) == ["cube 4x3", "square 4x3"]
    # The first number is no other size.
    assert labels(hidden=(4, 64)) == []
    assert labels(only=("cube",)) == ["cube 4x3"]


def test_nothing_left_is_said(ops):
    with pytest.raises(UserError, match="no case is left"):
        run(settings(tokens=(7,)))


def test_ours_comes_first_and_ways_have_names(ops, failing):
    names = [entry.name for entry in entries(ops["square"], [PEERS["torch"], failing])]
    assert names == [OURS, "torch", "Failing", "Failing, in place"]
    assert [entry.name for entry in entries(ops["cube"], [failing])] == [OURS]


def test_compiler_comes_last(ops, failing):
    peers = [Peer(**{**vars(failing), "name": "slow", "title": "Slow", "compiles": True}), failing]
    names = [entry.name for entry in entries(ops["square"], peers)]
    assert names == [OURS, "Failing", "Failing, in place", "Slow", "Slow, in place"]
    assert [name for name, peer in PEERS.items() if peer.compiles] == ["compile"]


def test_every_op_has_its_turn_before_a_second_case():
    assert in_turn(["a", "a", "a", "b", "c", "c"]) == [0, 3, 4, 1, 5, 2]


def test_cases_are_gone_through_in_turn_and_reported_in_order(ops):
    written = []
    report = run(settings(tokens=(4, 64)), written.append)
    order = [("cube", "4x3"), ("square", "64x5"), ("square", "4x3")]
    assert [(row.op, row.case) for row in report.rows] == order
    assert (report.cases, report.missing) == (3, ())
    first = make_op("cube").cases[0]
    ops._members["cube"] = make_op("cube", cases=(first, *make_op(rows=64, columns=5).cases))
    written.clear()
    run(settings(tokens=(4, 64)), written.append)
    # The last is the second case of each.
    assert [len(one.rows) for one in written] == [1, 2, 3, 4]
    assert [f"{one.op} {one.case}" for one in written[1].missing] == ["cube 64x5", "square 4x3"]


def test_interrupted_run_keeps_what_there_is(ops, failing):
    def interrupt(x):
        raise KeyboardInterrupt

    # A peer that does cube and is interrupted, as by a signal, in its second case.
    calls = []

    def adapter(x):
        calls.append(x.shape[0])
        return Prepared(run=(lambda: x * x) if x.shape[0] == 64 else (lambda: interrupt(x)), leaves=(x,))

    peer = Peer(**{**vars(failing), "adapters": {"square": {"": adapter, "again": adapter}}})
    op_benchmark.PEERS._members["failing"] = peer
    report = run(settings(against=("torch", "failing"), tokens=(4, 64)))
    found = [(row.op, row.case, row.contender) for row in report.rows]
    assert found[-2:] == [("square", "4x3", OURS), ("square", "4x3", "torch")]
    assert report.cases == 3
    (cut,) = report.missing
    assert str(cut) == "square 4x3 (without Failing, Failing, again)"
    assert {one.case for one in report.comparisons()} == {"4x3", "64x5"}
    assert ("square", "4x3") not in {(one.op, one.case) for one in report.comparisons()}


def test_interruption_that_a_library_swallowed_ends_the_run_too(ops):
    asked = iter([False, False, True])
    report = run(settings(), interrupted=lambda: next(asked))
    assert [row.op for row in report.rows] == ["cube"]
    assert [str(one) for one in report.missing] == ["square 4x3"]


def test_backward_over_its_input_changes_the_whole_case(ops, failing):
    """Ours is timed again when another contender cannot share its inputs."""
    peer = Peer(**{**vars(failing), "adapters": {"square": {"": lambda x: Prepared(
        run=lambda: Over.apply(x), leaves=(x,))}}})  # fmt: skip
    op_benchmark.PEERS._members["failing"] = peer
    report = run(settings(only=("square",), against=("torch", "failing")))
    assert [row.contender for row in report.rows] == [OURS, "torch", "Failing"]
    for row in report.rows:
        assert row.status == "ok", row.note
        assert "one graph for each input set" in row.note
        assert row.backward.iterations == 2 + min(10, 4 * 64 * 2**20 // row.bytes_forward)


def test_our_activation_in_place_is_timed(ops):
    """With the op as it is, on a size of a few numbers."""
    real = OPS["activation"]
    sample = next(one for one in real.samples if one.label == "swiglu: gradient over the input")
    case = BenchmarkCase(label="swiglu in place 4x24", make=sample.make, bytes_moved=lambda dtype: (1000, 1000))
    ops.register("activation")(replace(real, cases=(case,)))
    (row,) = run(settings(only=("activation",))).rows
    assert row.status == "ok", row.note
    assert row.accuracy.good


def test_op_of_ours_that_fails_is_a_row(ops, failing):
    def broken(x):
        raise ValueError("no such dtype")

    ops._members["square"] = make_op("square", function=broken)
    report = run(settings(only=("square",)))
    (row,) = report.rows
    assert (row.status, row.note) == ("failed", "ValueError: no such dtype")


def test_matrix_products_are_left_out_on_a_cpu_unless_named(ops):
    case = replace(make_op().cases[0], flops=8 * 10**12)
    ops._members["square"] = make_op("square", cases=(case,))
    rows = run(settings()).rows
    (left,) = [row for row in rows if row.status == "left out"]
    assert left.note == "8 TFLOP take minutes on a CPU; --only square runs it all the same"
    assert run(settings(only=("square",))).rows[0].status == "ok"


def test_dtype_is_the_case_s_unless_asked_for(ops):
    assert {row.dtype for row in run(settings(only=("cube",))).rows} == {"float32"}
    assert {row.dtype for row in run(settings(only=("cube",), dtype="bf16")).rows} == {"bfloat16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("cub",)}, r"unknown op 'cub' \(did you mean cube\?\)"),
        ({"against": ("ligr",)}, "unknown peer 'ligr'"),
        ({"device": "tpu"}, "device 'tpu' is unknown, expected cuda or cpu"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown, expected one of bf16, fp16, fp32"),
        ({"timing": "sundial"}, "timing 'sundial' is unknown, expected one of queued, graph, launched"),
        ({"seconds": 0.0}, "--seconds-per-case is 0.0, expected more than 0"),
    ],
)
def test_wrong_settings(ops, changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu():
    with pytest.raises(UserError, match="torch sees no GPU: use --device cpu"):
        Settings(device="cuda")


def test_every_op_has_cases_whose_bytes_can_be_counted():
    for name, op in OPS.items():
        assert op.cases, name
        for case in op.cases:
            forward, backward = case.bytes_moved(case.dtype)
            assert forward > 0, name
            assert (backward == 0) or op.differentiable, name
