"""Starts that are counted, compared and told, with starts of no time."""

import json
from pathlib import Path

import pytest

from megatron_ru.benchmarks import restart
from megatron_ru.benchmarks.restart import Settings, run
from megatron_ru.benchmarks.restart_case import KINDS, SIZES, Case, default_optimizer, find_size
from megatron_ru.benchmarks.restart_child import main as child
from megatron_ru.benchmarks.restart_report import progress, summary, write_json, write_plot
from megatron_ru.foundation.errors import UserError

SECONDS = {"cpu_fp32": 90.0, "device": 20.0, "meta": 10.0}
GIGABYTES = {"cpu_fp32": 30, "device": 6, "meta": 3}


@pytest.fixture
def asked(monkeypatch):
    """What the processes were asked for; each start takes the seconds of its kind, and one more each time."""
    asked = []

    def answer(folder, task, what):
        asked.append((what, task))
        if task["do"] == "read":
            return {"bytes": 4_000_000_000, "threads_seconds": 1.0, "torch_seconds": 2.0, "seconds": 1.0}
        kind = what.partition(",")[0]
        total = SECONDS[kind] + len([1 for other, _ in asked if other == what]) - 1
        parts = dict.fromkeys(("imports", "process_group", "build", "datasets", "first_step", "other"), 1.0)
        parts = {f"{name}_seconds": value for name, value in {**parts, "load": total / 8, "total": total}.items()}
        memory = {"cpu_bytes": GIGABYTES[kind] * 10**9, "gpu_bytes": 0}
        return {"parts": parts, "built": memory, "stepped": memory, "cpu_seconds": total}

    monkeypatch.setattr(restart, "_in_child", answer)
    return asked


def settings(tmp_path, **changes):
    return Settings(**{"size": SIZES["tiny"], "device": "cpu", "optimizer": "none", "folder": tmp_path, **changes})


def test_the_order_of_the_starts_and_what_they_load(asked, tmp_path):
    told = []
    results = run(settings(tmp_path), "command", lambda so_far: told.append(progress(so_far)))
    assert [what for what, _ in asked] == [
        "meta, fresh", "meta, fresh", "reading", "cpu_fp32, checkpoint", "device, checkpoint", "meta, checkpoint",
        "cpu_fp32, fresh", "device, fresh",
    ]  # fmt: skip
    # The first is for Python's files and counts for nothing; the second saves, and what was saved is loaded.
    saved = asked[1][1]["words"][asked[1][1]["words"].index("--save") + 1]
    loads = [task["words"][task["words"].index("--load") + 1] for _, task in asked[3:6]]
    assert loads == [saved] * 3
    assert all("--save" not in task["words"] for what, task in asked[2:] if what != "reading")
    assert all("--load" not in task["words"] for _, task in asked[6:])
    assert [task["on_cpu"] for _, task in asked if task["do"] == "start"].count(True) == 2
    assert [task["fp32"] for _, task in asked if task["do"] == "start"].count(True) == 2
    assert len(told) == len(results.cases) == 6
    assert told[-3].startswith("meta, checkpoint: 10.0 s (imports 1.0, ")
    assert not Path(saved).parent.exists()


def test_ratios_and_what_is_told(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    results = run(settings(tmp_path, repeat=2), "megatron-ru bench restart", lambda so_far: None)
    # The fastest of two starts.
    assert results.case("cpu_fp32", "checkpoint")["parts"]["total_seconds"] == 90
    assert results.load_ratio == pytest.approx(10 / 8)
    text = summary(results)
    assert "checkpoint: meta is 9.00 times as fast as cpu_fp32, with 10.00 times less CPU memory" in text
    assert "checkpoint: meta is 2.00 times as fast as device, with 2.00 times less CPU memory" in text
    assert "page cache to cpu: 4.00 GB in 1.00 s (by threads 1.00, by torch 2.00)" in text
    assert "meta loads its checkpoint in 1.25 times that time" in text
    write_json(results, tmp_path / "restart.json")
    stored = json.loads((tmp_path / "restart.json").read_text())
    assert stored["by_meta"]["cpu_fp32_checkpoint"] == {"seconds": 9.0, "cpu_bytes": 10.0, "gpu_bytes": None}
    assert stored["load_by_read"] == pytest.approx(1.25)
    assert len(stored["cases"]) == 12
    assert stored["size"]["parameters"] == SIZES["tiny"].parameters
    write_plot(results, tmp_path / "restart.png")
    assert (tmp_path / "restart.png").read_bytes().startswith(b"\x89PNG")


def test_a_start_that_fails_is_told_with_its_last_lines(tmp_path):
    with pytest.raises(UserError, match=r"the start meta, fresh ended with exit code 1") as raised:
        restart._in_child(tmp_path, {"do": "start"}, "meta, fresh")
    assert "KeyError: 'on_cpu'" in str(raised.value)


def test_a_checkpoint_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(restart.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**9}))
    with pytest.raises(UserError, match=r"about 16\.8 GB has no room .* has 1\.0 GB\); name a folder with --folder"):
        run(settings(tmp_path, size=SIZES["7b"]), "", print)


def test_files_are_read_into_memory(tmp_path):
    for name, size in (("one", 3_000_000), ("two", 17)):
        (tmp_path / name).write_bytes(bytes(size))
    task = {"do": "read", "device": "cpu", "paths": [str(tmp_path / name) for name in ("one", "two")], "times": 2}
    (tmp_path / "task.json").write_text(json.dumps(task))
    assert child(tmp_path / "task.json") == 0
    found = json.loads((tmp_path / "task.json").read_text())
    assert found["bytes"] == 3_000_017
    assert 0 < found["seconds"] == min(found["threads_seconds"], found["torch_seconds"])


def test_sizes():
    assert find_size("7b").parameters == 6_738_415_616  # Llama 2 7B
    assert find_size("2x128x352").parameters == 2 * (4 * 128**2 + 3 * 128 * 352 + 256) + 2 * 32000 * 128 + 128
    assert (find_size("7b").heads, find_size("2x128x352").heads) == (32, 2)
    assert (default_optimizer(find_size("100m")), default_optimizer(find_size("1b"))) == ("adamw", "none")
    for text in ("8b", "2x100x300", "2x1088x300", "0x128x352", "2x128"):
        with pytest.raises(UserError, match=f"--size {text}"):
            find_size(text)
    with pytest.raises(UserError, match="cpu_fp8"):
        Settings(size=SIZES["tiny"], device="cpu", optimizer="none", kinds=("cpu_fp8",))


def test_every_kind_is_another_run(tmp_path):
    words = {
        kind: tuple(Case(size=SIZES["tiny"], kind=kind, device="cpu", optimizer="none").words(tmp_path))
        for kind in KINDS
    }
    assert words["cpu_fp32"] == words["cpu_bf16"]  # The child builds one of them in fp32.
    assert len(set(words.values())) == 3
    assert "--ru-meta-init on" in " ".join(words["meta"])


@pytest.mark.slow
def test_it_measures_real_starts(tmp_path):
    results = run(settings(tmp_path, size=find_size("2x256x704")), "", print)
    assert {(case["kind"], case["start"]) for case in results.cases} == {
        (kind, start) for kind in ("cpu_fp32", "device", "meta") for start in ("fresh", "checkpoint")
    }
    for case in results.cases:
        assert (case["parts"]["load_seconds"] > 0) is (case["start"] == "checkpoint")
        assert 10**8 < case["built"]["cpu_bytes"] <= case["stepped"]["cpu_bytes"] < 10**10
    assert results.read["bytes"] > 2 * results.settings.size.parameters
