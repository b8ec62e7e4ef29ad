import json

import pytest

from megatron_ru.benchmarks.training.contender import Contender
from megatron_ru.benchmarks.training.contest import run
from megatron_ru.benchmarks.training.report import comparisons, markdown, summary, write_plot
from megatron_ru.benchmarks.training.result import TrainingReport, TrainingRow, read_json, write_json
from megatron_ru.benchmarks.training.task import Task
from megatron_ru.experiments.process import RunFailed
from megatron_ru.foundation.errors import UserError

TASK = Task(variant="ru_7b3", layers=8, sequence=4096, micro_batch=2, steps=20, device="cuda")


def document(forward_backward, step, memory, gemm):
    flops = TASK.shape().flops_per_token * TASK.tokens
    return {
        "device_name": "NVIDIA H200", "torch": "2.11.0", "gpus": 1, "forward_backward_seconds": forward_backward,
        "step_seconds": step, "peak_memory_gib": memory, "forward_backward_mfu": flops / forward_backward / 989e12,
        "mfu": flops / step / 989e12, "tokens_per_second": TASK.tokens / step, "tflop_s_per_gpu": flops / step / 1e12,
        "flops_per_step": flops, "matmul_flops_per_step": TASK.shape().matmul_flops_per_token * TASK.tokens,
        "attention_flops_per_step": TASK.shape().attention_flops_per_token * TASK.tokens, "peak_tflop_s": 989.0,
        "first_loss": 11.43, "last_loss": 11.4, "gap_microseconds": {"update": 900.0, "between steps": 5000.0},
        "causes": [
            {"cause": "GEMM", "part": "forward and backward", "microseconds": gemm, "calls": 99.0},
            {"cause": "optimizer", "part": "update", "microseconds": 15000.0, "calls": 2.0},
        ],
    }  # fmt: skip


def report(kind="train"):
    rows = (
        TrainingRow(contender="megatron_ru", status="ok", ours=True, document=document(0.15, 0.17, 44.4, 126100.0)),
        TrainingRow(contender="hf", status="ok", document=document(0.195, 0.228, 43.3, 122000.0)),
        TrainingRow(contender="compile", status="ok", document=document(0.165, 0.196, 37.3, 129000.0)),
        TrainingRow(contender="te", status="skipped", note="TransformerEngine is not installed"),
        TrainingRow(contender="mcore", status="failed", note="RuntimeError: out of memory"),
    )
    return TrainingReport(kind=kind, command="megatron-ru bench train", date="2026-01-01T00:00:00+00:00", task=TASK,
                          rows=rows)  # fmt: skip


def test_tables():
    shown = summary(report())
    lines = shown.splitlines()
    # 100.42 TFLOP in 150 ms are 669 TFLOP/s of 989.
    assert lines[3].split()[:4] == ["megatron_ru", "150.00", "67.7", "170.00"]
    [compiled] = [line for line in lines if line.startswith("compile ")]
    assert compiled.split()[-2:] == ["1.10", "1.15"]
    assert "te skipped: TransformerEngine is not installed" in lines
    assert "mcore failed: RuntimeError: out of memory" in lines
    # The cause of most time with its speed: 93.83 TFLOP in 126.1 ms; the best peer's time beside it.
    [gemm] = [line for line in lines if line.startswith("GEMM")]
    assert gemm.split() == ["GEMM", "126,100", "74.2", "99", "744", "129,000"]
    [idle] = [line for line in lines if line.startswith("no kernel runs")]
    assert idle.split()[3:5] == ["900", "0.5"]
    [rest] = [line for line in lines if line.startswith("steps that are not traced")]
    assert "28,000" in rest
    assert "1.004e+14 FLOPs a step" in shown
    assert "MFU = FLOPs / (seconds x GPUs x peak), peak 989 TFLOP/s" in shown


def test_beside_the_best_peer_of_each_quantity():
    assert comparisons(report()) == [
        "megatron_ru, forward and backward: 150.00 ms, best peer compile 165.00 ms: 1.100 times",
        "megatron_ru, whole step: 170.00 ms, best peer compile 196.00 ms: 1.153 times",
        "megatron_ru, peak memory: 44.40 GiB, best peer compile 37.30 GiB: 0.840 times",
    ]


def test_the_roof_competes_with_nobody():
    base = report()
    roof = TrainingRow(contender="roof", status="ok", document=document(0.14, 0.14, 5.0, 120000.0))
    found = TrainingReport(kind="train", command="c", date="d", task=TASK, rows=(*base.rows, roof))
    assert found.best_peer("step_seconds").contender == "compile"
    assert (
        "megatron_ru, forward and backward: 93.3% of the roof, matrix products and attention alone in 140.00 ms"
        in comparisons(found)
    )
    [gemm] = [line for line in summary(found).splitlines() if line.startswith("GEMM")]
    assert gemm.split()[-2:] == ["129,000", "120,000"]


def test_a_ladder_tells_the_gain_of_each_rung():
    rows = tuple(
        TrainingRow(contender=name, status="ok", ours=True, document=document(forward, forward + 0.02, 50, 1000.0))
        for name, forward in (("PyTorch", 0.38), ("+ flash attention", 0.18), ("all", 0.08))
    )
    ladder = TrainingReport(kind="fused-ladder", command="c", date="d", task=TASK, rows=rows)
    lines = summary(ladder).splitlines()
    assert lines[3].split()[-3:] == ["–", "1.00", "1.00"]
    assert lines[4].split()[-3:] == ["2.00", "2.11", "2.00"]
    assert lines[5].split()[-3:] == ["2.00", "4.75", "4.00"]
    assert "all: microseconds of a step by cause" in lines
    assert "best peer" not in "".join(lines)


def test_page_and_bars(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    page = markdown(report())
    assert "| megatron_ru | 150.00 | 67.7 | 170.00 |" in page
    assert "## megatron_ru by cause" in page
    write_plot(report(), tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_json_and_back(tmp_path):
    write_json(report(), tmp_path / "train.json")
    assert read_json(tmp_path / "train.json") == report()
    for name, text in (("a.json", "{}"), ("b.json", "no")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="holds no result of bench train"):
            read_json(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "absent.json")


def contenders(*names):
    return [Contender(name=name, words=("train", name)) for name in names]


def test_each_contender_is_measured_and_told_of(tmp_path):
    told = []

    def start(what, words, log, environment):
        assert environment["PYTHONPATH"].endswith("theirs")
        if what == "broken":
            log.write_text("something\nRuntimeError: the kernel failed\nbye\n")
            raise RunFailed("broken ended with exit code 1")
        found = {"skipped": "no GPU"} if what == "absent" else {"step_seconds": 1.0}
        (tmp_path / f"{what}.json").write_text(json.dumps(found))

    found = run("train", TASK, contenders("first", "broken", "absent"), start, tmp_path, {"PYTHONPATH": "theirs"},
                "command", lambda report: told.append([row.status for row in report.rows]))  # fmt: skip
    assert [(row.contender, row.status, row.note) for row in found.rows] == [
        ("first", "ok", ""), ("broken", "failed", "RuntimeError: the kernel failed"), ("absent", "skipped", "no GPU"),
    ]  # fmt: skip
    assert found.rows[0].document == {"step_seconds": 1.0}
    assert told[0] == ["ok", "missing", "missing"]
    assert told[-1] == ["ok", "failed", "skipped"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    def start(what, words, log, environment):
        if what == "second":
            raise KeyboardInterrupt
        (tmp_path / f"{what}.json").write_text("{}")

    found = run("train", TASK, contenders("first", "second", "third"), start, tmp_path, {}, "command")
    assert [row.status for row in found.rows] == ["ok", "missing", "missing"]


def test_an_older_result_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "first.json").write_text('{"step_seconds": 1.0}')
    found = run("train", TASK, contenders("first"), lambda *_: None, tmp_path, {}, "command")
    assert found.rows[0].status == "failed"


def test_more_gpus_are_compared_by_the_token():
    one, two = document(0.15, 0.17, 44.4, 126100.0), document(0.15, 0.17, 44.4, 126100.0)
    rows = (
        TrainingRow(contender="megatron_ru", status="ok", ours=True, document=one | {"tokens_per_step": 8192}),
        TrainingRow(contender="dp2@2", status="ok", ours=True, document=two | {"tokens_per_step": 16384, "gpus": 2}),
    )
    shown = summary(TrainingReport(kind="train", command="c", date="d", task=TASK, rows=rows)).splitlines()
    assert shown[4].split()[-2:] == ["0.50", "0.50"]
