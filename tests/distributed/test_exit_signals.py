"""A run that is told to leave saves the same step on all ranks, says so by its exit code, and goes on bit for bit."""

import json
import os
import signal
import sys

import pytest

from megatron_ru.foundation.heartbeat import Phase
from tests.distributed.rank_processes import OWN_ENTRY, RankProcesses
from tests.distributed.test_megatron_lm_host import checkouts

TWO_RANKS = ("--tensor-model-parallel-size", "2")


def losses(*runs):
    lines = [json.loads(line) for run in runs for line in run.metrics.read_text().splitlines()]
    return {line["iteration"]: line["lm loss"] for line in lines if "lm loss" in line}


@pytest.fixture(scope="module")
def whole(trainer):
    """The run that nobody disturbs."""
    run = trainer.run(2, *TWO_RANKS, name="never_signalled")
    run.assert_trained(range(1, 21))
    return run


def assert_left_and_resumed(trainer, whole, number, rank, name, command=OWN_ENTRY, environment=None):
    """A run of two ranks of which one is signalled, and its continuation, have the losses of `whole`."""
    save = trainer.folder / name
    flags = (*TWO_RANKS, "--save", str(save), "--save-interval", "100")
    how = {"command": command, "environment": environment}
    with RankProcesses(trainer, 2, *flags, name=f"{name}_left", **how) as left:
        left.reach(6)
        left.signal(rank, number)
        assert left.codes() == [75, 75], left.log(0)[-3000:]
        saved = int((save / "latest_checkpointed_iteration.txt").read_text())
        assert [left.beat(0).step, left.beat(1).step] == [saved, saved]
        assert [left.beat(0).phase, left.beat(1).phase] == [Phase.ENDED, Phase.ENDED]
        said = f"{number.name} reached rank {rank}: saving step {saved} of 20 in {save}"
        assert said in left.log(0)
        assert said not in left.log(1), "one rank speaks for all"
    assert 7 <= saved < 20
    with RankProcesses(trainer, 2, *flags, "--load", str(save), name=f"{name}_resumed", **how) as resumed:
        assert resumed.codes() == [0, 0], resumed.log(0)[-3000:]
        assert resumed.beat(1).step == 20
    assert losses(left, resumed) == whole.losses


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGUSR1, 1),
        pytest.param(signal.SIGUSR2, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_one_rank_is_signalled_and_the_resumed_run_has_the_losses_of_an_uninterrupted_one(trainer, whole, number, rank):
    assert_left_and_resumed(trainer, whole, number, rank, f"signal_{number.name}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_launcher_that_signals_the_whole_group_ends_no_data_loader(trainer, number):
    save = trainer.folder / f"group_{number.name}"
    flags = ("--num-workers", "2", "--save", str(save), "--save-interval", "100")
    with RankProcesses(trainer, 1, *flags, name=f"group_{number.name}") as ranks:
        ranks.reach(5)
        os.killpg(ranks.processes[0].pid, number)
        assert ranks.codes() == [75], ranks.log(0)[-3000:]
        assert int((save / "latest_checkpointed_iteration.txt").read_text()) == ranks.beat(0).step


@pytest.mark.hosts
@pytest.mark.skipif(not checkouts(), reason="MEGATRON_LM_CHECKOUTS names no Megatron-LM checkout")
@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
@pytest.mark.parametrize("entry", ["run_host", "MEGATRON_RU=1"])
def test_an_unmodified_megatron_lm(trainer, whole, checkout, entry):
    script = str(checkout / "pretrain_gpt.py")
    if entry == "run_host":
        command, environment = (sys.executable, "-m", "megatron_ru", "run_host", script), None
    else:
        command, environment = (sys.executable, script), {"MEGATRON_RU": "1"}
    name = f"signal_{checkout.name}_{entry[:3]}"
    assert_left_and_resumed(trainer, whole, signal.SIGUSR1, 1, name, command, environment)
