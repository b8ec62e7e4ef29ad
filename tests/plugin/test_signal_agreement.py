"""All ranks hear the same answer in the same step, whoever was signalled and however long their steps are."""

import json
import subprocess
import sys

import pytest

from megatron_ru.foundation.ranks import free_port
from megatron_ru.plugin import signal_agreement
from megatron_ru.plugin.signal_agreement import Agreement
from tests.training_runs import clean_environment

RANKS = 2
# Of each rank: the answers of its steps. Rank 1 notes 7 in step 5, and takes its time like a straggler.
STEPS = """
import json, sys, time
import torch.distributed as dist
from megatron_ru.plugin.signal_agreement import Agreement
dist.init_process_group("gloo")
agreement = Agreement()
answers = []
for step in range(1, 21):
    time.sleep(float(sys.argv[1]) * (1 + dist.get_rank()))
    answers.append(agreement.ask(7 if dist.get_rank() == 1 and step >= 5 else 0))
    if answers[-1]:
        break
agreement.settle()
print("answers", json.dumps(answers))
dist.barrier()
dist.destroy_process_group()
"""


def answers(seconds):
    meeting = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", STEPS, str(seconds)]
    processes = [
        subprocess.Popen(
            command, env=clean_environment({**meeting, "RANK": str(rank)}), stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    return [json.loads(output.partition("answers ")[2]) for output in outputs]


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        # The slowest rank's steps of 0.24 s: asked in each, answered in the next.
        (0.12, 6),
        # Of 0.06 s: asked in every sixth one or so.
        (0.03, None),
        # Of 1.2 s: answered at once.
        (0.6, 5),
    ],
)
def test_all_ranks_hear_of_one_ranks_signal_in_the_same_step(seconds, step):
    found = answers(seconds)
    assert found[0] == found[1]
    assert found[0][-1] == 7
    assert not any(found[0][:-1])
    if step is not None:
        assert len(found[0]) == step
    else:
        assert 6 <= len(found[0]) <= 12


def test_a_single_rank_asks_nobody(monkeypatch):
    monkeypatch.setattr(signal_agreement.torch.distributed, "get_world_size", lambda: 1)
    alone = Agreement()
    assert [alone.ask(note) for note in (0, 0, 12)] == [0, 0, 12]
    alone.settle()


class Echo:
    """All ranks have noted and taken the same."""

    def __init__(self):
        self.put_at = []

    def put(self, note, milliseconds):
        self.put_at.append(NOW[0])
        self.numbers = note, milliseconds

    def answer(self):
        return self.numbers


NOW = [0.0]


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setattr(signal_agreement, "_question", Echo)
    monkeypatch.setattr(signal_agreement.time, "perf_counter", lambda: NOW[0])
    return Agreement()


def run(agreement, seconds, signalled, steps=30):
    """The step in which the note is answered."""
    for step in range(1, steps):
        NOW[0] = step * seconds
        if agreement.ask(7 if step >= signalled else 0):
            return step
    return None


def test_short_steps_are_not_asked_each(together):
    assert run(together, 0.0501, signalled=100, steps=28) is None
    # The first, of which nothing is known, so that the second is measured; then eight steps of 50 ms make 0.4 s.
    assert [round(time / 0.0501) for time in together._question.put_at] == [1, 2, 10, 18, 26]


@pytest.mark.parametrize(
    ("seconds", "signalled", "answered"),
    [(0.25, 1, 1), (0.25, 2, 2), (0.25, 10, 11), (1.5, 10, 10), (600.0, 3, 3), (0.0501, 8, 11), (0.0501, 11, 19)],
)
def test_when_a_note_is_answered(together, seconds, signalled, answered):
    assert run(together, seconds, signalled) == answered
