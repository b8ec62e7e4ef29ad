"""What the words alone let a start do."""

import os

import pytest

from megatron_ru.plugin import early_start
from megatron_ru.plugin.early_start import begin_early, early_problems, threads_of_a_rank


@pytest.fixture
def begun(monkeypatch):
    """The checks that were begun, as (folder, rank, ranks, step)."""
    begun = []

    class Check:
        def __init__(self, folder, rank, ranks, *, threads, step):
            begun.append((str(folder), rank, ranks, step))

        def problems(self, place, rank, ranks):
            return [f"{place.name} {rank}/{ranks}"]

    monkeypatch.setattr(early_start, "EarlyCheck", Check)
    monkeypatch.setattr(early_start, "_early", None)
    return begun


def begin(*words, safe=True):
    begin_early(words, rank=1, ranks=4, safe=safe)


def test_the_folder_that_will_be_loaded_is_checked(begun, tmp_path):
    begin("--lr", "1", "--load", str(tmp_path), "--ckpt-step", "20")
    begin(f"--load={tmp_path}")
    assert begun == [(str(tmp_path), 1, 4, 20), (str(tmp_path), 1, 4, None)]
    assert early_problems(tmp_path / "iter_0000020", 1, 4) == ["iter_0000020 1/4"]


def test_nothing_is_checked_that_nobody_would_look_at(begun, tmp_path):
    load = ("--load", str(tmp_path))
    begin("--lr", "1")
    begin("--load", str(tmp_path / "missing"))
    begin("--load", "msc://bucket/run")
    begin(*load, "--ru-checkpoints", "megatron")
    begin(*load, safe=False)
    assert begun == []
    assert early_problems(tmp_path, 1, 4) is None
    begin(*load, "--ru-checkpoints=safe", safe=False)
    assert len(begun) == 1


def test_indexes_of_the_data_are_read_ahead(begun, tmp_path, monkeypatch):
    for name in ("text.idx", "text.bin", "cache/samples.npy", "other.idx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    advised = []
    monkeypatch.setattr(
        early_start.os, "posix_fadvise", lambda fd, *rest: advised.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    begin("--data-path", "0.3", str(tmp_path / "text"), "0.7", str(tmp_path / "missing"),
          "--data-cache-path", str(tmp_path / "cache"))  # fmt: skip
    assert [os.path.relpath(path, tmp_path) for path in advised] == ["text.idx", "cache/samples.npy"]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(early_start.os, "cpu_count", lambda: 16)
    for ranks, threads in (("", 8), ("1", 8), ("4", 4), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert threads_of_a_rank() == threads
