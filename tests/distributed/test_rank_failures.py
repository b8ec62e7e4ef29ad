"""A rank that fails ends at once and says why; one that hangs shows where."""

import signal
import sys
import time

import pytest

from megatron_ru.foundation.heartbeat import STACKS_SIGNAL, Phase, stacks_path
from tests.distributed.rank_processes import RankProcesses
from tests.distributed.test_megatron_lm_host import checkouts

TWO_RANKS = ("--tensor-model-parallel-size", "2")


def test_an_exception_in_one_rank_ends_it_at_once_with_step_and_place(trainer):
    fault = {"MEGATRON_RU_FAULT": "raise,rank=1,step=4"}
    with RankProcesses(trainer, 2, *TWO_RANKS, name="raising", environment=fault) as ranks:
        ranks.reach(3)
        since = time.monotonic()
        assert ranks.processes[1].wait(timeout=30) == 1
        assert time.monotonic() - since < 10, "it waits for nobody"
        failure = ranks.failure(1)
        assert (failure["rank"], failure["step"], failure["exception"]) == (1, 3, "RuntimeError")
        assert failure["message"] == "MEGATRON_RU_FAULT asked for an exception before step 4"
        assert "faults.py:" in failure["where"]
        assert "train_step" in failure["traceback"]
        assert ranks.log(1).count("[rank1]: Traceback (most recent call last)") == 1
        # gloo tells the other rank that its peer is gone.
        assert ranks.codes(60) == [1, 1]
        assert ranks.failure(0)["step"] == 3
    assert [ranks.beat(rank).phase for rank in (0, 1)] == [Phase.TRAINING, Phase.TRAINING], "it did not end well"


@pytest.mark.hosts
@pytest.mark.skipif(not checkouts(), reason="MEGATRON_LM_CHECKOUTS names no Megatron-LM checkout")
@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
def test_an_exception_inside_an_unmodified_megatron_lm(trainer, checkout):
    environment = {"MEGATRON_RU_FAULT": "raise,rank=1,step=4", "MEGATRON_RU": "1"}
    command = (sys.executable, str(checkout / "pretrain_gpt.py"))
    name = f"raising_{checkout.name}"
    with RankProcesses(trainer, 2, *TWO_RANKS, name=name, environment=environment, command=command) as ranks:
        assert ranks.codes() == [1, 1]
        assert (ranks.failure(1)["step"], ranks.failure(1)["exception"]) == (3, "RuntimeError")
        assert ranks.log(1).count("[rank1]: Traceback (most recent call last)") == 1


def test_who_hangs_and_who_waits_is_seen_in_the_stacks(trainer):
    fault = {"MEGATRON_RU_FAULT": "hang,rank=0,step=4"}
    with RankProcesses(trainer, 2, *TWO_RANKS, name="hanging", environment=fault) as ranks:
        ranks.reach(3)
        until = time.monotonic() + 60
        while "hang on rank 0" not in ranks.log(0):
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1)
        before = [ranks.beat(rank).counter for rank in (0, 1)]
        stacks = []
        for rank in (0, 1):
            ranks.signal(rank, STACKS_SIGNAL)
        for rank in (0, 1):
            while "pretrain_gpt" not in stacks_path(ranks.beat_file(rank)).read_text():
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(0.2)
            stacks.append(stacks_path(ranks.beat_file(rank)).read_text())
        assert "faults.py" in stacks[0]
        assert "distributed_c10d.py" not in stacks[0]
        assert "faults.py" not in stacks[1]
        assert "distributed_c10d.py" in stacks[1]
        time.sleep(1)
        assert [ranks.beat(rank).counter for rank in (0, 1)] == before, "nobody beats while nothing moves"
        assert [process.poll() for process in ranks.processes] == [None, None]


def test_evaluation_saving_and_the_end_are_told(trainer):
    flags = (
        "--save",
        str(trainer.folder / "phases"),
        "--save-interval",
        "4",
        "--eval-iters",
        "3",
        "--eval-interval",
        "4",
    )
    with RankProcesses(trainer, 1, *flags, name="phases", steps=4) as ranks:
        assert ranks.codes() == [0], ranks.log(0)[-3000:]
        # Opened, training begins, 4 steps, evaluation of 3 iterations in the loop and 2 × 3 after it, saving 2 beats,
        # the end.
        assert ranks.beat(0).counter == 1 + 1 + 4 + 3 + 2 * 3 + 2 + 1
        assert (ranks.beat(0).step, ranks.beat(0).phase) == (4, Phase.ENDED)
        assert ranks.failure(0) is None


def test_bad_input_is_told_to_the_keeper_as_it_is_to_the_user(trainer):
    with RankProcesses(trainer, 1, "--ru-variant", "lama2_tiny", name="refused_with_keeper") as ranks:
        assert ranks.codes() == [2]
        assert ranks.failure(0)["exception"] == "UserError"
        assert "did you mean llama2_tiny" in ranks.failure(0)["message"]
        assert "Traceback" not in ranks.log(0)


def test_without_save_the_code_is_75_and_one_sentence_says_that_nothing_was_saved(trainer):
    with RankProcesses(trainer, 1, name="nowhere_to_save") as ranks:
        ranks.reach(2)
        ranks.signal(0, signal.SIGTERM)
        assert ranks.codes() == [75], ranks.log(0)[-3000:]
        assert "nothing was saved, because the run has no --save (exit code 75)" in ranks.log(0)
        assert ranks.beat(0).step < 20


@pytest.mark.slow
def test_on_request_without_a_guard(trainer):
    with RankProcesses(trainer, 1, "--ru-exit-signals", name="on_request", heartbeats=False) as ranks:
        until = time.monotonic() + 60
        while not ranks.metrics.exists() and time.monotonic() < until:
            time.sleep(0.01)
        ranks.signal(0, signal.SIGUSR1)
        assert ranks.codes() == [75]


@pytest.mark.slow
def test_without_a_guard_and_a_request_signals_do_what_they_do_anywhere(trainer):
    with RankProcesses(trainer, 1, name="plain", heartbeats=False) as ranks:
        until = time.monotonic() + 60
        while not ranks.metrics.exists() and time.monotonic() < until:
            time.sleep(0.01)
        ranks.signal(0, signal.SIGUSR1)
        assert ranks.codes() == [-signal.SIGUSR1]
