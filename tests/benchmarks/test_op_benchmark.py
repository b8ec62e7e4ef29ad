import json

import pytest
import torch

from megatron_ru.benchmarks import op_benchmark
from megatron_ru.benchmarks.op_benchmark import Settings, chosen, entries, run
from megatron_ru.benchmarks.peer import PEERS, Peer, Prepared
from megatron_ru.benchmarks.report import write_json
from megatron_ru.benchmarks.result import OURS
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.registry import Registry
from megatron_ru.ops.op import OPS
from tests.benchmarks.conftest import make_op


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


def test_op_of_ours_that_fails_is_a_row(ops, failing):
    def broken(x):
        raise ValueError("no such dtype")

    ops._members["square"] = make_op("square", function=broken)
    report = run(settings(only=("square",)))
    (row,) = report.rows
    assert (row.status, row.note) == ("failed", "ValueError: no such dtype")


def test_matrix_products_are_left_out_on_a_cpu_unless_named(ops):
    from dataclasses import replace

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
