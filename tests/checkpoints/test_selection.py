"""Which checkpoint is loaded when files were torn, cut, emptied, removed or changed in one bit."""

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.checkpoints.manifest import MANIFEST
from megatron_ru.checkpoints.ranks import Alone
from megatron_ru.checkpoints.selection import select, whole_iterations
from megatron_ru.checkpoints.wholeness import share_problems
from megatron_ru.foundation.errors import UserError
from tests.checkpoints.saved import FILES, flip, save


def chosen(folder, ranks=None, **settings):
    ranks = ranks or Alone()
    return select(folder, ranks, lambda place: share_problems(place, ranks.rank, ranks.size, threads=2), **settings)


class Together:
    """Ranks that are threads."""

    def __init__(self, rank, barrier, board):
        self.rank, self.size, self._barrier, self._board = rank, barrier.parties, barrier, board

    def all(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait()
        return values

    def first(self, value):
        return self.all(value)[0]


def chosen_by(folder, size, **settings):
    """What each of `size` ranks chose, or was told."""
    barrier, board, results = threading.Barrier(size, timeout=20), {}, {}

    def choose(rank):
        try:
            results[rank] = chosen(folder, Together(rank, barrier, board), **settings)
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, 4, 8, 12)
    return tmp_path


def test_what_the_tracker_names_is_loaded_when_it_is_whole(folder):
    assert chosen(folder).iteration == 12
    assert chosen(folder).problems == ()
    assert chosen(folder).named


FAULTS = ("truncate", "flip", "remove", "empty", "append")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from([*FILES, MANIFEST]), fault=st.sampled_from(FAULTS), where=st.integers(0, 8 * 70_000))
def test_any_fault_of_any_file_is_named_and_the_checkpoint_before_it_is_loaded(name, fault, where):
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save(folder, 4, 8, 12)
        path = folder / "iter_0000012" / name
        size = path.stat().st_size
        if fault == "truncate":
            os.truncate(path, where % size)
        elif fault == "flip":
            flip(path, where)
        elif fault == "remove":
            path.unlink()
        elif fault == "empty":
            path.write_bytes(b"")
        else:
            path.write_bytes(path.read_bytes() + b"\0")
        if name == MANIFEST and fault in ("remove", "append"):
            # Without a manifest it is one of Megatron's; a zero byte after the JSON makes it none.
            assert chosen(folder).iteration in (8, 12)
            return
        found = chosen(folder)
        assert found.iteration == 8
        assert not found.named
        assert len(found.problems) == 1
        assert f"iter_0000012/{name}" in found.problems[0]


def test_sentences_hold_the_numbers(folder):
    os.truncate(folder / "iter_0000012" / "__0_0.distcp", 17)
    (folder / "iter_0000012" / "metadata.json").unlink()
    flip(folder / "iter_0000008" / "__1_0.distcp", 5)
    found = chosen(folder)
    assert found.iteration == 4
    assert found.problems[:2] == (
        "iter_0000012/__0_0.distcp has 17 bytes, expected 5000",
        "iter_0000012/metadata.json is missing",
    )
    assert found.problems[2].startswith("iter_0000008/__1_0.distcp was changed between bytes 0 and 70001 (CRC32 ")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_ranks_choose_the_same_whoever_reads_the_damage(folder, size):
    for name in FILES:
        flip(folder / "iter_0000012" / name, 3)
    found = chosen_by(folder, size)
    assert len({choice.iteration for choice in found}) == 1
    assert found[0].iteration == 8
    assert len(found[0].problems) == len(FILES)
    assert found[-1] == found[0]


@pytest.mark.parametrize("torn", ["", "1\x002", "iter"])
def test_torn_tracker(folder, torn):
    (folder / TRACKER).write_text(torn)
    assert chosen(folder).iteration == 12
    assert not chosen(folder).named


def test_lost_tracker(folder):
    (folder / TRACKER).unlink()
    assert chosen(folder).iteration == 12


def test_a_save_that_was_killed_before_its_tracker_counts(folder):
    before = (folder / TRACKER).stat()
    save(folder, 16)
    (folder / TRACKER).write_text("12")
    os.utime(folder / TRACKER, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert chosen(folder).iteration == 16


def test_a_tracker_that_the_user_set_back_is_obeyed(folder):
    (folder / TRACKER).write_text("8")
    assert chosen(folder).iteration == 8
    assert chosen(folder).named
    shutil.rmtree(folder / "iter_0000008")
    assert chosen(folder).iteration == 4, "what was left behind on purpose is the last choice"


def test_step_is_loaded_or_nothing(folder):
    assert chosen(folder, step=4).iteration == 4
    flip(folder / "iter_0000008" / "__0_0.distcp", 9)
    with pytest.raises(UserError, match=r"--ckpt-step 8 is not whole in .*iter_0000008/__0_0.distcp was changed"):
        chosen(folder, step=8)
    with pytest.raises(UserError, match="iter_0000020 is missing"):
        chosen(folder, step=20)


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_whole_where_the_tracker_names_something_is_refused_on_every_rank(folder, size):
    for iteration in (4, 8, 12):
        flip(folder / f"iter_{iteration:07d}" / "__1_0.distcp", iteration)
    found = chosen_by(folder, size)
    assert len(set(found)) == 1
    assert f"{folder} has no whole checkpoint, but its {TRACKER} names '12'" in found[0]
    for iteration in (4, 8, 12):
        assert f"iter_{iteration:07d}/__1_0.distcp" in found[0]


def test_a_tracker_alone_is_refused(tmp_path):
    (tmp_path / TRACKER).write_text("12")
    with pytest.raises(UserError, match=r"iter_0000012 is missing; bring one back, or remove"):
        chosen(tmp_path)


def test_nothing_finished_is_a_new_run(tmp_path):
    assert chosen(tmp_path).iteration is None
    (tmp_path / "iter_0000004").mkdir()
    found = chosen(tmp_path)
    assert found.iteration is None
    assert "iter_0000004 has no metadata.json" in found.problems[0]


def test_release(tmp_path):
    (tmp_path / TRACKER).write_text("release")
    with pytest.raises(UserError, match="release is missing"):
        chosen(tmp_path)
    rank = tmp_path / "release" / "mp_rank_00"
    rank.mkdir(parents=True)
    import torch

    torch.save({"model": torch.arange(9)}, rank / "model_optim_rng.pt")
    found = chosen(tmp_path)
    assert (found.iteration, found.release, found.name) == (0, True, "release")


def test_whole_iterations_by_names_and_sizes(folder):
    os.truncate(folder / "iter_0000008" / ".metadata", 1)
    assert whole_iterations(folder) == [4, 12]
