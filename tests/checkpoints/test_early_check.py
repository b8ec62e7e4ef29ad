"""What a process finds out about a checkpoint while its rank does something else."""

import subprocess
import sys

import pytest

from megatron_ru.checkpoints import early_check
from megatron_ru.checkpoints.early_check import EarlyCheck, main
from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.checkpoints.manifest import MANIFEST
from tests.checkpoints.saved import flip, save


def check(folder, rank=0, ranks=1, **settings):
    return EarlyCheck(folder, rank, ranks, threads=2, **settings)


def test_a_whole_checkpoint_and_a_changed_one(tmp_path):
    save(tmp_path, 10, 20)
    place = tmp_path / "iter_0000020"
    early = check(tmp_path)
    assert early.problems(place, 0, 1) == []
    # One answer is for one load.
    assert early.problems(place, 0, 1) is None
    flip(place / "__1_0.distcp", 777)
    (sentence,) = check(tmp_path).problems(place, 0, 1)
    assert sentence.startswith("iter_0000020/__1_0.distcp was changed between bytes 0 and 70001")


def test_ranks_check_their_shares(tmp_path):
    save(tmp_path, 20)
    flip(tmp_path / "iter_0000020" / "__1_0.distcp", 777)
    found = [check(tmp_path, rank, 2).problems(tmp_path / "iter_0000020", rank, 2) for rank in (0, 1)]
    assert sorted(map(len, found)) == [0, 1]


def test_what_was_not_looked_at_is_unknown(tmp_path):
    save(tmp_path, 10, 20)
    early = check(tmp_path)
    assert early.problems(tmp_path / "iter_0000010", 0, 1) is None
    assert early.problems(tmp_path / "iter_0000020", 0, 2) is None
    assert early.problems(tmp_path.parent / "iter_0000020", 0, 1) is None
    assert early.problems(tmp_path / "iter_0000020", 0, 1) == []
    assert check(tmp_path, step=10).problems(tmp_path / "iter_0000010", 0, 1) == []


def test_the_newest_that_has_the_right_names_and_sizes_is_looked_at(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "iter_0000020" / ".metadata").unlink()
    assert check(tmp_path).problems(tmp_path / "iter_0000010", 0, 1) == []


@pytest.mark.parametrize("what", ["nothing", "no manifest", "torn"])
def test_the_rest_is_left_to_the_rank(tmp_path, what):
    if what != "nothing":
        save(tmp_path, 20)
        (tmp_path / "iter_0000020" / MANIFEST).unlink()
    if what == "torn":
        (tmp_path / "iter_0000020" / "metadata.json").write_text("{")
    assert main([str(tmp_path), "0", "1", "1"]) == 0
    assert check(tmp_path).problems(tmp_path / "iter_0000020", 0, 1) is None
    assert (tmp_path / TRACKER).exists() is (what != "nothing")


def test_a_process_that_cannot_start_or_is_stopped_says_nothing(tmp_path, monkeypatch):
    save(tmp_path, 20)
    early = check(tmp_path)
    early.stop()
    early.stop()
    assert early.problems(tmp_path / "iter_0000020", 0, 1) is None

    def refuse(*arguments, **keywords):
        raise OSError("no more processes")

    monkeypatch.setattr(early_check.subprocess, "Popen", refuse)
    assert check(tmp_path).problems(tmp_path / "iter_0000020", 0, 1) is None


def test_it_imports_no_torch():
    code = "import sys, megatron_ru.checkpoints.early_check; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
