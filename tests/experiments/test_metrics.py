import json

from megatron_ru.experiments.metrics import MetricsReader, read_metrics
from megatron_ru.figures.series import Series

LINES = [
    {"iteration": 0, "validation lm loss": 8.0, "seconds": 1.0},
    {"iteration": 1, "lm loss": 7.5, "learning_rate": 0.1, "seconds": 0.9},
    {"iteration": 2, "lm loss": 7.0, "learning_rate": 0.1, "seconds": 0.3},
    {"iteration": 2, "validation lm loss": 6.5, "seconds": 1.0},
    {"iteration": 2, "validation lm loss": 6.5, "seconds": 1.0},
    {"iteration": 3, "lm loss": 6.0, "learning_rate": 0.1, "seconds": 0.2},
    {"iteration": 3, "validation lm loss": 5.0, "seconds": 1.0},
    {"iteration": 3, "test lm loss": 4.0, "seconds": 1.0},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_steps_and_evaluations_are_told_apart(tmp_path):
    write(tmp_path / "m.jsonl", LINES)
    found = read_metrics(tmp_path / "m.jsonl")
    assert found.train_series() == Series(name="training", x=(1.0, 2.0, 3.0), y=(7.5, 7.0, 6.0))
    assert found.validation_series() == Series(name="validation", x=(0.0, 2.0, 3.0), y=(8.0, 6.5, 5.0))
    assert found.first_and_last_validation() == (8.0, 5.0)
    assert found.median_step_seconds() == 0.3
    assert found.repeated == [(2, 6.5, 6.5)]


def test_no_file_is_no_metrics(tmp_path):
    found = read_metrics(tmp_path / "m.jsonl")
    assert (found.train, found.first_and_last_validation(), found.median_step_seconds()) == ({}, None, None)


def test_a_line_that_is_being_written_is_read_when_it_ends(tmp_path):
    path = tmp_path / "m.jsonl"
    reader = MetricsReader(path)
    write(path, LINES[:2])
    whole = json.dumps(LINES[2])
    with path.open("a") as stream:
        stream.write(whole[:12])
    assert reader.update().train == {1: 7.5}
    with path.open("a") as stream:
        stream.write(whole[12:] + "\n")
    assert reader.update().train == {1: 7.5, 2: 7.0}
