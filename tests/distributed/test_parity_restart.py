"""A run that is killed and resumed gives the very losses of the run that never stopped (fp32, CPU)."""

import os
import re
import signal
import subprocess

import pytest

from tests.training_runs import kill_group, relative_difference, wait_for_step

FOUR_RANKS = ("--tensor-model-parallel-size", "2", "--use-distributed-optimizer")


def ranks_of(process):
    """The pids of the ranks that a torchrun process started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_kill_9_of_a_rank_and_resume_is_bit_identical(trainer):
    save = trainer.folder / "killed_checkpoints"
    whole = trainer.run(4, *FOUR_RANKS, name="uninterrupted")
    whole.assert_trained(range(1, 21))

    process = trainer.start(4, *FOUR_RANKS, "--save", str(save), "--save-interval", "4", name="killed")
    try:
        wait_for_step(trainer.folder / "killed.jsonl", 10, process)
        os.kill(ranks_of(process)[2], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        kill_group(process)

    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved in (8, 12)
    resumed = trainer.run(
        4, *FOUR_RANKS, "--load", str(save), "--save", str(save), "--save-interval", "100", name="resumed"
    )
    resumed.assert_trained(range(saved + 1, 21))
    assert resumed.losses == {step: whole.losses[step] for step in range(saved + 1, 21)}


@pytest.mark.slow
def test_checkpoint_of_one_layout_continues_in_another(trainer, single):
    save = trainer.folder / "resharded_checkpoints"
    first = trainer.run(
        2, "--pipeline-model-parallel-size", "2", "--save", str(save), "--save-interval", "10", "--exit-interval", "10",
        name="before_resharding",
    )  # fmt: skip
    first.assert_trained(range(1, 11))
    second = trainer.run(2, "--tensor-model-parallel-size", "2", "--load", str(save), name="after_resharding")
    second.assert_trained(range(11, 21))
    assert relative_difference(single, second) < 1e-4


@pytest.mark.slow
def test_distributed_optimizer_checkpoint_is_saved_for_any_layout_on_request(trainer, single):
    save = trainer.folder / "reshardable_checkpoints"
    flags = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    trainer.run(2, *flags, "--save", str(save), "--save-interval", "10", "--exit-interval", "10",
                name="before_dp_resharding").assert_trained(range(1, 11))  # fmt: skip
    second = trainer.run(
        2, *flags, "--tensor-model-parallel-size", "2", "--load", str(save), name="after_dp_resharding"
    )
    second.assert_trained(range(11, 21))
    assert relative_difference(single, second) < 1e-4


def test_resume_restores_the_learning_rate_schedule_and_the_data_position(trainer):
    save = trainer.folder / "schedule_checkpoints"
    run = trainer.run(1, "--save", str(save), "--save-interval", "5", "--exit-interval", "5", name="schedule", steps=20)
    assert run.returncode == 0, run.output[-3000:]
    again = trainer.run(1, "--load", str(save), "--exit-interval", "6", name="schedule_resumed", steps=20)
    assert re.search(r"iteration\s+6/\s+20 \| consumed samples:\s+48 ", again.output), again.output[-3000:]
