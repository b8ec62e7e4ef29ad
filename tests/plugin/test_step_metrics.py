"""Lines of the metrics file, without a run around them."""

import json

import pytest
import torch

from megatron_ru.plugin.step_metrics import StepMetrics


@pytest.fixture
def ranks(monkeypatch):
    """Sets (rank, world size) of this process."""

    def set_ranks(rank, world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: world)

    set_ranks(0, 1)
    return set_ranks


def training_log(loss_dict, learning_rate, iteration, skipped_iter, grad_norm, other=None):
    return f"logged {iteration}"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_line_for_every_logged_step(tmp_path, ranks):
    path = tmp_path / "runs" / "metrics.jsonl"
    log = StepMetrics(str(path), every=2).seam().make(training_log)
    loss = torch.tensor(1.1)
    for iteration in range(1, 5):
        shown = log({"lm loss": loss / iteration}, 3e-4, iteration, skipped_iter=0, grad_norm=torch.tensor(0.5))
        assert shown == f"logged {iteration}"
    found = lines(path)
    assert [line["iteration"] for line in found] == [2, 4]
    assert all(line.pop("seconds") >= 0 for line in found)
    # Every digit of the fp32 value.
    assert found[0] == {
        "iteration": 2, "lm loss": (loss / 2).item(), "learning_rate": 3e-4, "gradient_norm": 0.5, "skipped": 0,
    }  # fmt: skip


def test_what_megatron_does_not_know_is_null(tmp_path, ranks):
    path = tmp_path / "metrics.jsonl"
    log = StepMetrics(str(path), every=1).seam().make(training_log)
    log({}, None, 1, 1, None)
    [line] = lines(path)
    assert (line["learning_rate"], line["gradient_norm"], line["skipped"]) == (None, None, 1)


def test_the_last_rank_writes(tmp_path, ranks):
    path = tmp_path / "metrics.jsonl"
    for rank in (0, 1, 3):
        ranks(rank, 4)
        StepMetrics(str(path), every=1).seam().make(training_log)({"lm loss": 1.0}, 0.1, rank, 0, 0.2)
    assert [line["iteration"] for line in lines(path)] == [3]


def test_lines_are_appended(tmp_path, ranks):
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 2):
        StepMetrics(str(path), every=1).seam().make(training_log)({"lm loss": 1.0}, 0.1, iteration, 0, 0.2)
    assert [line["iteration"] for line in lines(path)] == [1, 2]


def test_the_seams_fit_this_megatron(cpu_device):
    metrics = StepMetrics("metrics.jsonl", every=1)
    for seam in (metrics.seam(), *metrics.evaluation_seams()):
        assert seam.install()
        seam.undo()


def test_lines_of_another_kind_are_the_last_rank_s_and_a_full_disk_loses_them(tmp_path, ranks, caplog):
    path = tmp_path / "metrics.jsonl"
    metrics = StepMetrics(str(path), every=1)
    metrics.tell({"iteration": 1, "startup": {"imports_seconds": 2.5}})
    ranks(0, 2)
    metrics.tell({"iteration": 2, "save_error": "No space left on device"})
    assert lines(path) == [{"iteration": 1, "startup": {"imports_seconds": 2.5}}]
    ranks(1, 2)
    StepMetrics("/dev/full", every=1).tell({"iteration": 3})
    assert "a line for step 3 is lost" in caplog.text
