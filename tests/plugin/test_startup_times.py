"""The seconds of a start, part by part, without a start."""

import time
from types import SimpleNamespace

import pytest

from megatron_ru.plugin.startup_times import PARTS, StartupTimes, sentence


@pytest.fixture
def told(monkeypatch):
    import megatron.training

    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace(curr_iteration=40))
    return []


def test_parts_are_counted_once_and_sum_up_to_the_whole(told):
    times = StartupTimes(lambda iteration, seconds: told.append((iteration, seconds)))
    made = {seam.target.partition(":")[2]: seam.make for seam in times.seams()}
    load = made["load_checkpoint"](lambda: time.sleep(0.2))

    def setup():
        time.sleep(0.1)
        load()

    step = made["train_step"](lambda: time.sleep(0.05) or "loss")
    made["setup_model_and_optimizer"](setup)()
    made["build_train_valid_test_data_iterators"](time.sleep)(0.03)
    assert told == []
    assert [step(), step()] == ["loss", "loss"]
    ((iteration, seconds),) = told
    assert iteration == 41
    assert seconds["build_seconds"] == pytest.approx(0.1, abs=0.08)
    assert seconds["load_seconds"] == pytest.approx(0.2, abs=0.08)
    assert seconds["first_step_seconds"] == pytest.approx(0.05, abs=0.04)
    assert seconds["datasets_seconds"] == pytest.approx(0.03, abs=0.04)
    parts = [seconds[f"{name}_seconds"] for name in PARTS]
    assert sum(parts) == pytest.approx(seconds["total_seconds"], abs=0.01)
    assert len(seconds) == len(PARTS) + 1


def test_a_part_that_fails_is_over(told):
    times = StartupTimes(lambda *found: told.append(found))
    made = {seam.target.partition(":")[2]: seam.make for seam in times.seams()}

    def fail():
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        made["load_checkpoint"](fail)()
    made["train_step"](lambda: None)()
    assert told[0][1]["load_seconds"] < 0.1


def test_sentence_for_the_log():
    seconds = {f"{name}_seconds": number / 2 for number, name in enumerate(PARTS)} | {"total_seconds": 10.5}
    assert sentence(seconds) == (
        "first step done 10.5 s after the start of the process: imports 0.0, process group 0.5, build 1.0, load 1.5, "
        "datasets 2.0, first step 2.5, other 3.0"
    )
