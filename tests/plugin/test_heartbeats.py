"""What beats where in Megatron's loop, and who may not beat."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_ru.foundation.heartbeat import Beat, Phase, create_beat_file, read_beat, read_failure
from megatron_ru.plugin import heartbeats


@pytest.fixture
def path(tmp_path):
    create_beat_file(tmp_path / "rank0")
    return tmp_path / "rank0"


@pytest.fixture
def opened(path):
    yield heartbeats.open_heartbeat({"RU_HEARTBEAT": str(path)})
    heartbeats.close_heartbeat()


@pytest.fixture
def replaced(opened):
    """Makes the replacement of a name from its original."""
    seams = {seam.target.rpartition(":")[2]: seam for seam in heartbeats.heartbeat_seams(opened)}
    return lambda original: seams[original.__name__].make(original)


def test_without_a_keeper_there_is_no_heartbeat():
    assert heartbeats.open_heartbeat({}) is None
    assert heartbeats.current_heartbeat() is None
    heartbeats.tell_failure(RuntimeError())


def test_it_beats_once_when_opened_and_is_taken_out_of_the_environment(path):
    environ = {"RU_HEARTBEAT": str(path), "RANK": "0"}
    try:
        first = heartbeats.open_heartbeat(environ)
        assert environ == {"RANK": "0"}
        assert heartbeats.open_heartbeat(environ) is first
        assert read_beat(path) == Beat(1, -1, Phase.STARTING)
    finally:
        heartbeats.close_heartbeat()


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_step_beats_before_it_is_logged(path, replaced, as_keyword):
    seen = []

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale):
        seen.append((read_beat(path), loss_dict, iteration))
        return "report memory"

    log = replaced(training_log)
    given = log({"lm loss": 1.0}, {}, 0.1, iteration=41, loss_scale=1) if as_keyword else log({}, {}, 0.1, 41, 1)
    assert given == "report memory"
    assert seen == [(Beat(2, 41, Phase.TRAINING), {"lm loss": 1.0} if as_keyword else {}, 41)]


def test_evaluation_and_saving_have_phases_of_their_own(path, opened, replaced):
    seen = []

    def on_eval_step_end():
        seen.append(read_beat(path))

    def save_checkpoint(iteration, model):
        seen.append(read_beat(path))

    opened.beat(10, Phase.TRAINING)
    replaced(on_eval_step_end)()
    replaced(on_eval_step_end)()
    replaced(save_checkpoint)(10, model=None)
    assert seen == [Beat(3, 10, Phase.EVALUATING), Beat(4, 10, Phase.EVALUATING), Beat(5, 10, Phase.SAVING)]
    assert read_beat(path) == Beat(6, 10, Phase.EVALUATING)


def test_a_resumed_run_starts_from_its_checkpoint(path, replaced, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "megatron.training", SimpleNamespace(get_args=lambda: SimpleNamespace(iteration=12))
    )

    def train():
        return read_beat(path)

    assert replaced(train)() == Beat(2, 12, Phase.STARTING)


def test_the_names_are_there_and_take_what_is_expected(opened):
    seams = heartbeats.heartbeat_seams(opened)
    assert len(seams) == 4
    for seam in seams:
        assert seam.install()
        seam.undo()


def test_the_end_is_told_by_the_process_that_opened_it_and_by_no_child(path):
    code = """
import os
from megatron_ru.foundation.heartbeat import read_beat
from megatron_ru.plugin import heartbeats
path = os.environ["RU_HEARTBEAT"]
heartbeats.open_heartbeat(os.environ)
if (child := os.fork()) == 0:
    raise SystemExit
os.waitpid(child, 0)
print(read_beat(path).phase.name)
"""
    environment = {**os.environ, "RU_HEARTBEAT": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "STARTING\n"
    assert read_beat(path) == Beat(2, -1, Phase.ENDED)


def test_a_failure_is_told(path, opened):
    heartbeats.tell_failure(ValueError("a is 3"))
    assert read_failure(path)["message"] == "a is 3"
