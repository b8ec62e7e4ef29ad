"""A page of a run that was restarted, evaluated and lost a save."""

import base64
import json
import re

import pytest

from megatron_ru.experiments.run_report.page import panels, summary, write_page
from megatron_ru.experiments.run_report.records import find_metrics, find_profiles, read_records
from megatron_ru.foundation.errors import UserError


def step(iteration, loss, **more):
    return {
        "iteration": iteration, "lm loss": loss, "learning_rate": 1e-3, "gradient_norm": 2.0, "skipped": 0,
        "tokens_per_second": 1000.0 * iteration, "mfu": 0.5, "seconds": 4.0, **more,
    }  # fmt: skip


LINES = [
    {"iteration": 1, "startup": {"imports_seconds": 4.0, "total_seconds": 6.5}},
    step(2, 5.0), step(4, 4.0, nan_gradients=3, nan_losses=1, skipped=1), step(6, 3.5),
    {"iteration": 6, "validation lm loss": 3.75, "seconds": 1.0},
    {"iteration": 6, "save_error": "the disk is full"},
    {"iteration": 5, "startup": {"imports_seconds": 3.0, "total_seconds": 5.0}},
    step(6, 3.25), step(8, 3.0, peak_memory_gib=44.5),
    {"iteration": 8, "validation lm loss": 3.5, "seconds": 1.0},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    # The run is still writing its last line.
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"iteration": 9, "lm lo')
    (tmp_path / "documents.jsonl").write_text('{"text": "Жили-были"}\n')
    profile = {"step_seconds": 0.2, "device_name": "NVIDIA H200", "causes": [
        {"cause": "GEMM", "part": "forward and backward", "microseconds": 150_000.0, "calls": 99.0}]}  # fmt: skip
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    return tmp_path


def test_records(run):
    assert find_metrics(run) == [run / "metrics.jsonl"]
    records = read_records(run / "metrics.jsonl")
    assert records.series("lm loss").y == (5.0, 4.0, 3.25, 3.0)
    assert (records.repeated, records.damaged) == (1, 1)
    assert records.evaluations == {"validation lm loss": {6: 3.75, 8: 3.5}}
    assert [total for _, total in records.startups][1]["total_seconds"] == 5.0
    assert records.events == [(6, "save_error: the disk is full")]
    assert records.total("nan_gradients").y == (0, 3, 3, 3)
    # A line stands for two steps, the first for what came before it too.
    assert records.step_seconds().y == (2.0, 2.0, 2.0)


def test_summary(run):
    found = dict(summary(read_records(run / "metrics.jsonl")))
    assert found["logged steps"] == "4, from 2 to 8"
    assert found["lm loss"] == "5.0000 → 3.0000"
    assert found["validation lm loss"] == "3.5000 at 8; best 3.5000 at 8"
    assert found["tokens/s, median"] == "5,000"
    assert found["MFU %, median"] == "50.0"
    assert found["peak memory, GiB"] == "44.5"
    assert (found["skipped steps"], found["gradient tensors with a NaN"], found["losses that were none"]) == (
        "1", "3", "1",
    )  # fmt: skip


def test_panels_of_what_was_told_alone(run):
    names = [panel.name for panel in panels(read_records(run / "metrics.jsonl"))]
    assert names == [
        "loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "step_seconds", "peak_memory", "counters",
    ]  # fmt: skip


def test_the_page_needs_nothing_else(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    records = read_records(run / "metrics.jsonl")
    # Two panels draw as eight do.
    records.steps = {iteration: {"gradient_norm": float("nan") if iteration == 4 else 1.0, "lm loss": 2.0}
                     for iteration in records.steps}  # fmt: skip
    written = write_page(run / "report.html", "Run <1>", [records], find_profiles(run), run / "figures")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in written] == ["loss.png", "gradient_norm.png"]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(picture) for picture in pictures] == [path.read_bytes() for path in written]
    assert not re.search(r"https?://|<script|<link", page)
    assert "Run &lt;1&gt;" in page
    assert "<td>GEMM</td><td>forward and backward</td><td>150,000</td><td>75.0</td>" in page
    assert "the disk is full" in page


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*\.jsonl with training steps: train with --ru-metrics"):
        find_metrics(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        find_metrics(tmp_path / "absent")
