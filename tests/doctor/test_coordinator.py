"""What rank 0 makes of the ranks' answers, and how it compares clocks; whole runs are in test_together."""

import threading
import time

import pytest
import torch.distributed as dist

from megatron_ru.doctor.conversation import Conversation
from megatron_ru.doctor.coordinator import ask_time, combined
from megatron_ru.doctor.measurements import AllReduce
from megatron_ru.doctor.participant import tell_time

GOOD = {"seconds": 0.5, "latency_seconds": 1e-5, "bytes": 1000, "right": True}


def test_slowest_rank_counts():
    answers = {0: GOOD, 3: {**GOOD, "seconds": 0.75, "latency_seconds": 3e-5}}
    assert combined(("a", "b"), answers) == AllReduce(
        nodes=("a", "b"), ranks=2, right=True, bytes=1000, seconds=0.75, latency_seconds=3e-5
    )


@pytest.mark.parametrize(
    ("answer", "error", "right"),
    [
        ({"error": "RuntimeError: closed"}, "rank 3: RuntimeError: closed", True),
        ({**GOOD, "right": False}, None, False),
    ],
)
def test_one_bad_answer_is_enough(answer, error, right):
    found = combined(("a",), {0: GOOD, 3: answer})
    assert (found.error, found.right) == (error, right)


@pytest.mark.parametrize("off", [-400.0, 0.0, 2.5])
def test_clock_that_is_off_is_measured(off):
    talk = Conversation(dist.HashStore())
    other = threading.Thread(target=tell_time, args=(talk, 5, 20.0, lambda: time.time() + off))
    other.start()
    skew = ask_time(talk, 5)
    other.join()
    assert skew.seconds == pytest.approx(off, abs=0.2)
    # The true skew lies within what the answer took.
    assert abs(skew.seconds - off) <= skew.uncertainty_seconds + 1e-3


def test_clock_of_a_host_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("megatron_ru.doctor.coordinator.PING_SECONDS", 0.1)
    assert ask_time(Conversation(dist.HashStore()), 5) is None
