"""Saving and loading around a Megatron of a few lines, in one process."""

import errno
import os
from argparse import Namespace

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.safe_checkpoints import safe_checkpoint_seams
from megatron_ru.plugin.safe_loading import SafeLoading
from megatron_ru.plugin.safe_saving import SafeSaving
from tests.checkpoints.saved import flip, save

FULL = OSError(errno.ENOSPC, "No space left on device")


def arguments(**changes):
    settings = {
        "ru_checkpoints": "safe", "ru_keep": None, "ru_keep_every": None, "save": None, "load": None,
        "pretrained_checkpoint": None, "async_save": False, "train_iters": 20, "ckpt_step": None,
    }  # fmt: skip
    return Namespace(**settings | changes)


class Saver:
    """A run that saves in Megatron's way: its own names for folder and tracker, replaced where ours are."""

    def __init__(self, folder, **changes):
        self.args = arguments(save=str(folder), **changes)
        self.reported = []
        saving = SafeSaving(self.args, 2, self.reported.append)
        made = {seam.target.rpartition(":")[2]: seam.make for seam in saving.seams()}
        self.name = made["get_checkpoint_name"](lambda path, iteration: os.path.join(path, f"iter_{iteration:07d}"))
        self.tracker = made["get_checkpoint_tracker_filename"](lambda path: os.path.join(path, TRACKER))
        self.torch_save = made["save"](torch.save)
        self.save_config = made["save_config"](self.write_config)
        self.told = made["on_save_checkpoint_success"](lambda *told: self.wandb.append(told))
        self.save = made["save_checkpoint"](self.save_checkpoint)
        self.wandb, self.config_error, self.error = [], None, None

    def write_config(self, place):
        if self.config_error:
            raise self.config_error
        with open(os.path.join(place, "metadata.json"), "w") as stream:
            stream.write("{}")

    def save_checkpoint(self, iteration, **keywords):
        folder = self.args.save
        self.place = self.name(folder, iteration)
        self.torch_save({"step": iteration}, os.path.join(self.place, "weights.pt"))
        if self.error:
            raise self.error
        self.save_config(self.place)
        with open(self.tracker(folder), "w") as stream:
            stream.write(str(iteration))
        self.told(self.place, self.tracker(folder), folder, iteration)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_save_is_written_elsewhere_and_published(tmp_path):
    run = Saver(tmp_path)
    run.save(4)
    assert run.place == str(tmp_path / ".iter_0000004.saving")
    assert names(tmp_path) == ["iter_0000004", TRACKER]
    assert names(tmp_path / "iter_0000004") == ["metadata.json", "ru_manifest.json", "weights.pt"]
    assert (tmp_path / TRACKER).read_text() == "4"
    assert run.wandb == [(str(tmp_path / "iter_0000004"), str(tmp_path / TRACKER), str(tmp_path), 4)]
    assert run.name(str(tmp_path), 4) == str(tmp_path / "iter_0000004")


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("config_error", FULL, "No space left on device"),
        ("error", CheckpointException("write", {3: (FULL, None)}), "rank 3: No space left on device"),
        ("error", CheckpointException("write", {}), ""),
    ],
)
def test_a_save_that_fails_costs_itself_alone(tmp_path, capsys, where, error, said):
    run = Saver(tmp_path)
    run.save(4)
    setattr(run, where, error)
    run.save(8)
    assert names(tmp_path) == ["iter_0000004", TRACKER]
    assert (tmp_path / TRACKER).read_text() == "4"
    assert run.reported[0]["iteration"] == 8
    assert said in run.reported[0]["save_error"]
    assert len(run.wandb) == 1
    shown = capsys.readouterr().err
    assert f"ERROR: step 8 could not be saved in {tmp_path}: {said}" in shown
    assert "MB free); step 4 is the newest checkpoint; training goes on" in shown
    setattr(run, where, None)
    run.save(12)
    assert names(tmp_path) == ["iter_0000004", "iter_0000012", TRACKER]


def test_a_writer_of_torch_that_fails_is_noted(tmp_path):
    run = Saver(tmp_path)
    run.name_before, run.name = run.name, lambda *words: os.path.join(run.name_before(*words), "missing", "folder")
    run.config_error = FULL
    run.save(4)
    assert "does not exist" in run.reported[0]["save_error"], "the first error counts"
    assert names(tmp_path) == []


def test_the_last_step_that_is_not_saved_is_no_success(tmp_path):
    run = Saver(tmp_path)
    run.config_error = FULL
    with pytest.raises(UserError, match=r"step 20 could not be saved .* there is no checkpoint yet; make room"):
        run.save(20)


def test_other_errors_are_not_ours(tmp_path):
    run = Saver(tmp_path)
    run.error = RuntimeError("a mistake in the model")
    with pytest.raises(RuntimeError, match="a mistake in the model"):
        run.save(4)


def test_non_persistent_saves_are_megatron_s(tmp_path):
    (tmp_path / "iter_0000004").mkdir()
    run = Saver(tmp_path)
    run.save(4, non_persistent_ckpt=True)
    assert run.place == str(tmp_path / "iter_0000004")


def test_keeps_as_many_as_asked(tmp_path, capsys):
    run = Saver(tmp_path, ru_keep=1, ru_keep_every=8)
    for step in (4, 8, 12, 16, 18):
        run.save(step)
    left = [name for name in names(tmp_path) if name.startswith("iter")]
    assert left == ["iter_0000008", "iter_0000016", "iter_0000018"]
    assert "removing the checkpoints of step 4 (--ru-keep)" in capsys.readouterr().out


def loaded(args):
    """What Megatron would read the tracker as, and its --ckpt-step, while it loads."""
    loading = SafeLoading(args, 1)
    made = {seam.target.rpartition(":")[2]: seam.make for seam in loading.seams()}
    read = made["read_metadata"](lambda tracker: pytest.fail("the tracker was taken at its word"))
    return made["load_checkpoint"](
        lambda *rest: (read(os.path.join(args.load, TRACKER)), args.ckpt_step, args.pretrained_checkpoint)
    )(None, None, None)


def test_megatron_is_told_the_whole_one(tmp_path, capsys):
    save(tmp_path, 4, 8)
    flip(tmp_path / "iter_0000008" / "__0_0.distcp", 77)
    (tmp_path / TRACKER).write_text("")
    args = arguments(load=str(tmp_path), pretrained_checkpoint="elsewhere")
    assert loaded(args) == ((4, False), 4, None)
    assert (args.ckpt_step, args.pretrained_checkpoint) == (None, "elsewhere")
    shown = capsys.readouterr().err
    assert "WARNING" in shown
    assert "iter_0000008/__0_0.distcp was changed" in shown
    assert f"loading step 4 from {tmp_path}, the newest whole checkpoint; {TRACKER} names none" in shown


def test_what_was_found_early_is_not_looked_for_again(tmp_path, monkeypatch):
    save(tmp_path, 4, 8)
    known = {"iter_0000008": ["iter_0000008/__0_0.distcp was changed"], "iter_0000004": []}
    asked = []

    def early(place, rank, ranks):
        asked.append((place.name, rank, ranks))
        return known.get(place.name)

    monkeypatch.setattr("megatron_ru.plugin.safe_loading.early_problems", early)
    monkeypatch.setattr("megatron_ru.plugin.safe_loading.share_problems", lambda *rest, **more: pytest.fail("read"))
    assert loaded(arguments(load=str(tmp_path)))[0] == (4, False)
    assert asked == [("iter_0000008", 0, 1), ("iter_0000004", 0, 1)]


def test_needless_copies_are_left_out_while_megatron_loads(tmp_path):
    save(tmp_path, 4)
    made = {seam.target.rpartition(":")[2]: seam.make for seam in SafeLoading(arguments(load=str(tmp_path)), 1).seams()}
    matrix = torch.ones(4, 3)
    load = made["load_checkpoint"](lambda *rest: torch.cat(matrix.chunk(2)).data_ptr() == matrix.data_ptr())
    assert load(None, None, None) is True
    assert torch.cat(matrix.chunk(2)).data_ptr() != matrix.data_ptr()


def test_only_one_s_own_folder_is_swept(tmp_path, capsys):
    save(tmp_path, 4)
    (tmp_path / ".iter_0000008.saving").mkdir()
    loaded(arguments(load=str(tmp_path), save=str(tmp_path / "other")))
    assert (tmp_path / ".iter_0000008.saving").exists()
    loaded(arguments(load=str(tmp_path), save=str(tmp_path)))
    assert not (tmp_path / ".iter_0000008.saving").exists()
    assert "removed .iter_0000008.saving, which a killed save left unfinished" in capsys.readouterr().out


def test_an_empty_folder_is_left_to_megatron(tmp_path):
    made = {seam.target.rpartition(":")[2]: seam.make for seam in SafeLoading(arguments(load="x"), 1).seams()}
    assert made["load_checkpoint"](lambda *rest, load_arg="load": "from the beginning")(1, 2, 3) == "from the beginning"


def test_without_safe_nothing_is_replaced_and_nothing_kept():
    assert safe_checkpoint_seams(arguments(ru_checkpoints="megatron", save="a", load="a"), print) == []
    assert safe_checkpoint_seams(arguments(), print) == []
    with pytest.raises(UserError, match="need --ru-checkpoints safe"):
        safe_checkpoint_seams(arguments(ru_checkpoints=None, ru_keep=2), print)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ru_keep": 0}, "--ru-keep 0 was given, expected 1 or more"),
        ({"ru_keep": 1, "ru_keep_every": -1}, "--ru-keep-every -1 was given"),
        ({"ru_keep_every": 8}, "add --ru-keep N"),
        ({"ru_keep": 1, "save_retain_interval": 8}, "drop one of them"),
    ],
)
def test_numbers_that_cannot_be_kept(changes, message):
    with pytest.raises(UserError, match=message):
        safe_checkpoint_seams(arguments(**changes), print)


def test_megatron_s_own_retention_becomes_ours():
    args = arguments(save="a", save_retain_interval=8)
    safe_checkpoint_seams(args, print)
    assert (args.ru_keep, args.ru_keep_every, args.save_retain_interval) == (1, 8, None)
