"""Runs that are killed while they save, that load damaged checkpoints, and whose disk is full."""

import json
import os
import random
import shutil
import subprocess
import time

import pytest

from tests.checkpoints.saved import flip
from tests.distributed.rank_processes import RankProcesses
from tests.distributed.test_megatron_lm_host import checkouts
from tests.training_runs import torchrun

TRACKER = "latest_checkpointed_iteration.txt"
SAVE_SECONDS = 0.15
"""About what a save takes here."""
TWO_RANKS = ("--use-distributed-optimizer",)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(path):
    return {line["iteration"]: line["lm loss"] for line in lines(path) if "lm loss" in line}


def checkpoints_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def whole(trainer):
    """The run that nobody disturbs, with a checkpoint after steps 5, 10, 15 and 20."""
    run = trainer.run(2, *TWO_RANKS, "--save", str(trainer.folder / "whole"), "--save-interval", "5", name="whole")
    run.assert_trained(range(1, 21))
    return run


@pytest.fixture
def saved(trainer, whole, tmp_path):
    """A copy of its checkpoints."""
    shutil.copytree(trainer.folder / "whole", tmp_path / "saved")
    return tmp_path / "saved"


def goes_on_from(trainer, whole, saved, step, name, command=None):
    """A run that loads `saved` goes on from `step` with the losses of `whole`; returns its log."""
    run = trainer.run(2, *TWO_RANKS, "--load", str(saved), "--save", str(saved), "--save-interval", "5",
                      "--ru-checkpoints", "safe", name=name, command=command)  # fmt: skip
    run.assert_trained(range(step + 1, 21))
    assert run.losses == {number: whole.losses[number] for number in range(step + 1, 21)}
    assert checkpoints_in(saved) == [f"iter_{number:07d}" for number in (5, 10, 15, 20)]
    return run.output


def test_a_flipped_bit_and_a_torn_tracker_cost_one_interval(trainer, whole, saved):
    flip(saved / "iter_0000020" / "__1_0.distcp", 8 * 100_000)
    (saved / TRACKER).write_text("")
    (saved / ".iter_0000018.saving").mkdir()
    log = goes_on_from(trainer, whole, saved, 15, "flipped")
    assert log.count("iter_0000020/__1_0.distcp was changed between bytes 0 and ") == 1
    assert log.count(f"loading step 15 from {saved}, the newest whole checkpoint; {TRACKER} names none") == 1
    assert "removed .iter_0000018.saving, which a killed save left unfinished" in log
    assert (saved / TRACKER).read_text() == "20"


@pytest.mark.slow
def test_megatron_s_own_checkpoints_are_loaded_and_a_missing_file_is_seen(trainer, whole, saved):
    for manifest in saved.glob("*/ru_manifest.json"):
        manifest.unlink()
    (saved / "iter_0000020" / "metadata.json").unlink()
    log = goes_on_from(trainer, whole, saved, 15, "megatron_s_own")
    assert "iter_0000020 has no metadata.json" in log


def test_nothing_whole_is_no_new_run(trainer, whole, saved):
    for number in (5, 10, 15, 20):
        os.truncate(saved / f"iter_{number:07d}" / "__0_0.distcp", 100)
    run = trainer.run(2, *TWO_RANKS, "--load", str(saved), name="nothing_whole")
    assert run.returncode != 0
    assert "exitcode  : 2" in run.output
    assert f"{saved} has no whole checkpoint, but its {TRACKER} names '20'" in run.output
    assert "iter_0000005/__0_0.distcp has 100 bytes, expected" in run.output
    assert not run.metrics.exists()


def test_asynchronous_saves_are_published_whole_and_old_ones_go(trainer, whole, tmp_path):
    save = tmp_path / "asynchronous"
    run = trainer.run(
        2, *TWO_RANKS, "--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore",
        "--save", str(save), "--save-interval", "5", "--ru-keep", "1", "--ru-keep-every", "10", name="asynchronous",
    )  # fmt: skip
    run.assert_trained(range(1, 21))
    assert run.losses == whole.losses
    assert checkpoints_in(save) == ["iter_0000010", "iter_0000020"]
    assert (save / TRACKER).read_text() == "20"
    manifest = json.loads((save / "iter_0000020" / "ru_manifest.json").read_text())
    assert [file["path"] for file in manifest["files"]] == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json",
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 30 MB, which one checkpoint of 16 MB fits on."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize(
    "how",
    [(), pytest.param(("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"),
                      marks=pytest.mark.slow)],
    ids=["synchronous", "asynchronous"],
)  # fmt: skip
def test_a_full_disk_costs_checkpoints_and_no_training(trainer, whole, small_disk, how):
    save, name = small_disk / "saved", f"full_disk_{len(how)}"
    run = trainer.run(2, *TWO_RANKS, *how, "--save", str(save), "--save-interval", "4", "--exit-interval", "19",
                      name=name)  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    assert run.losses == {step: whole.losses[step] for step in range(1, 20)}
    assert checkpoints_in(save) == ["iter_0000004"]
    assert (save / TRACKER).read_text() == "4"
    assert [line["iteration"] for line in lines(run.metrics) if line.get("save_error")] == [8, 12, 16, 19]
    assert f"ERROR: step 8 could not be saved in {save}: rank " in run.output
    assert run.output.count("step 4 is the newest checkpoint; training goes on") == 4


@pytest.mark.slow
def test_a_full_disk_in_the_last_step_is_no_success_and_room_lets_it_end_well(trainer, whole, small_disk):
    save = small_disk / "saved"
    words = (*TWO_RANKS, "--save", str(save), "--load", str(save), "--save-interval", "10")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8_000_000))
    run = trainer.run(2, *words, name="full_at_the_end")
    assert "exitcode  : 2" in run.output, run.output[-3000:]
    assert f"step 20 could not be saved in {save}" in run.output
    assert "step 10 is the newest checkpoint; make room there and start the same command again" in run.output
    ballast.unlink()
    again = trainer.run(2, *words, "--ru-keep", "1", name="with_room", environment={"TMPDIR": str(save.parents[1])})
    assert again.losses == {step: whole.losses[step] for step in range(11, 21)}


def killed_while_saving(trainer, save, processes, flags, name, saves, rng):
    """Kills all ranks of a run at some moment of its n-th save; returns its last step."""
    words = (*flags, "--save", str(save), "--load", str(save), "--save-interval", "3")
    metrics = trainer.folder / f"{name}.jsonl"
    with RankProcesses(trainer, processes, *words, name=name, heartbeats=False) as run:
        # What an earlier kill left stays until that step is saved again.
        wait_until(lambda: losses(metrics) or ended(run))
        left = {path: path.stat().st_mtime_ns for path in save.glob(".iter_*.saving")}

        def saving():
            return [path for path in save.glob(".iter_*.saving") if made(path) not in (None, left.get(path))]

        for number in range(saves):
            if number:
                wait_until(lambda: not saving() or ended(run))
            wait_until(lambda: saving() or ended(run))
        time.sleep(rng.random() * SAVE_SECONDS)
    return max(losses(metrics), default=0)


def made(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def ended(run):
    return any(process.poll() is not None for process in run.processes)


def wait_until(condition, seconds=120):
    """Returns at once when it holds, or when the seconds are over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not condition():
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("kills", "processes", "flags"),
    [
        (3, 2, TWO_RANKS),
        pytest.param(20, 4, (*TWO_RANKS, "--tensor-model-parallel-size", "2"),
                     marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=["3 kills, 2 ranks", "20 kills, 4 ranks"],
)  # fmt: skip
def test_kill_9_while_saving(trainer, whole, tmp_path, kills, processes, flags):
    rng = random.Random(kills)
    save = tmp_path / "killed"
    reference = whole.losses
    if processes == 4:
        undisturbed = trainer.run(4, *flags, name="whole_of_four")
        undisturbed.assert_trained(range(1, 21))
        reference = undisturbed.losses
    cut_off = resumed = 0
    for number in range(kills):
        name = f"killed_{processes}_{number}"
        # The first one leaves something to resume from.
        last = killed_while_saving(trainer, save, processes, flags, name, rng.randrange(1, 3) if number else 2, rng)
        cut_off += bool(list(save.glob(".iter_*.saving")))
        found = losses(trainer.folder / f"{name}.jsonl")
        assert found == {step: reference[step] for step in found}
        resumed += min(found, default=1) > 1
        newest = max((int(path.name[5:]) for path in save.glob("iter_*")), default=0)
        assert last - newest <= 3, "no more than one interval is lost"
        if last >= 18:
            # The next one starts from the beginning.
            shutil.rmtree(save)
    words = (*flags, "--save", str(save), "--load", str(save), "--save-interval", "3")
    with RankProcesses(trainer, processes, *words, name=f"killed_{processes}_end", heartbeats=False) as end:
        assert end.codes() == [0] * processes, end.log(0)[-3000:]
    found = losses(end.metrics)
    assert found == {step: reference[step] for step in found}
    assert max(found) == 20
    assert resumed >= kills / 3
    assert cut_off >= kills / 3, "kills that miss the save prove little"
    assert not list(save.glob(".iter_*"))


@pytest.mark.hosts
@pytest.mark.skipif(not checkouts(), reason="MEGATRON_LM_CHECKOUTS names no Megatron-LM checkout")
@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
def test_unmodified_megatron_lm_saves_and_loads_safely(trainer, tmp_path, checkout):
    save = tmp_path / "host"
    command = [*torchrun(2), "-m", "megatron_ru", "run_host", str(checkout / "pretrain_gpt.py")]
    words = ("--ru-checkpoints", "safe", "--save", str(save), "--save-interval", "5", "--ru-keep", "3")
    whole = trainer.run(2, *words, name=f"saves_{checkout.name}", command=command)
    whole.assert_trained(range(1, 21))
    assert checkpoints_in(save) == ["iter_0000010", "iter_0000015", "iter_0000020"]
    os.truncate(save / "iter_0000020" / "__0_0.distcp", 1000)
    command = [*torchrun(2), "-m", "megatron_ru", "run_host", str(checkout / "pretrain_gpt.py")]
    again = trainer.run(2, *words, "--load", str(save), name=f"loads_{checkout.name}", command=command)
    again.assert_trained(range(16, 21))
    assert again.losses == {step: whole.losses[step] for step in range(16, 21)}
    assert "iter_0000020/__0_0.distcp has 1000 bytes, expected" in again.output
