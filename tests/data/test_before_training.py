import json
import os
import subprocess
import sys
import threading
import time

import pytest

from megatron_ru.data.before_training import prepare_data
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.foundation.errors import UserError
from tests.training_runs import clean_environment, torchrun


@pytest.fixture
def pipeline(config_of, tmp_path):
    """(path of the config, the config)."""
    config = config_of("out")
    return str(tmp_path / "out.yaml"), config


def test_words_get_the_data(pipeline, tokenizer_file):
    path, config = pipeline
    said = []
    words = prepare_data(["--lr", "1", "--ru-data", path], 0, said.append)
    assert words == [
        "--lr", "1", "--ru-data", path, "--train-data-path", f"{config.output}/train", "--valid-data-path",
        f"{config.output}/valid", "--tokenizer-model", tokenizer_file, "--seq-length", "64",
    ]  # fmt: skip
    assert any("publish done" in line for line in said)
    said.clear()
    kept = ["--ru-data", path, "--tokenizer-model", "x", "--seq-length", "32"]
    assert prepare_data(kept, 0, said.append)[6:] == [
        "--train-data-path", f"{config.output}/train", "--valid-data-path", f"{config.output}/valid",
    ]  # fmt: skip
    assert len(said) == 1
    assert "holds the data of" in said[0]


def test_domains_are_blended_by_their_weights(config_of, tmp_path):
    config = config_of("out", mixture=None)
    words = prepare_data(["--ru-data", str(tmp_path / "out.yaml")], 0, lambda line: None)
    train = words[words.index("--train-data-path") + 1 : words.index("--valid-data-path")]
    assert train == ["700000", f"{config.output}/ru_train", "300000", f"{config.output}/en_train"]


def test_without_a_held_out_document_nothing_is_evaluated(config_of, tmp_path, tokenizer_file):
    config_of("out", tokens={"tokenizer": tokenizer_file})
    words = ["--ru-data", str(tmp_path / "out.yaml")]
    prepared = prepare_data(words, 0, lambda line: None)
    assert "--valid-data-path" not in prepared
    assert prepared[prepared.index("--eval-iters") + 1] == "0"
    assert prepare_data([*words, "--eval-iters", "0"], 0, lambda line: None)[-4:-2] == ["--eval-iters", "0"]
    for asked in (["--eval-iters", "2"], ["--eval-iters=2"]):
        with pytest.raises(UserError, match=r"set tokens.held_out, or pass --eval-iters 0"):
            prepare_data([*words, *asked], 0, lambda line: None)


def test_words_without_the_flag_are_left_alone(monkeypatch):
    assert prepare_data(["--lr", "1"], 0) == ["--lr", "1"]
    monkeypatch.setenv("RUADAPT_NO_TRAIN", "1")
    with pytest.raises(UserError, match=r"RUADAPT_NO_TRAIN is set, but there is no --ru-data"):
        prepare_data(["--lr", "1"], 0)


def test_data_is_named_once(pipeline):
    with pytest.raises(UserError, match=r"--ru-data brings the data of the run, and --data-path names other"):
        prepare_data(["--ru-data", pipeline[0], "--data-path", "x"], 0)


def test_no_training_ends_behind_the_data(pipeline, monkeypatch):
    path, config = pipeline
    monkeypatch.setenv("RUADAPT_NO_TRAIN", "1")
    assert prepare_data(["--ru-data", path], 0, lambda line: None) is None
    assert os.path.exists(f"{config.output}/train.idx")


def test_other_ranks_wait_for_the_first(pipeline):
    path, config = pipeline
    found = []
    waiting = threading.Thread(target=lambda: found.append(prepare_data(["--ru-data", path], 1)))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    assert not os.path.exists(f"{config.output}/run.json")
    first = prepare_data(["--ru-data", path], 0, lambda line: None)
    waiting.join(10)
    assert found == [first]


def test_other_ranks_learn_that_the_first_failed(pipeline, corpus):
    path, _ = pipeline
    with (corpus[0] / "en.jsonl").open("a") as stream:
        stream.write("no JSON\n")
    failures = []

    def wait():
        try:
            prepare_data(["--ru-data", path], 1)
        except UserError as error:
            failures.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(UserError, match=r"en.jsonl:301: not JSON"):
        prepare_data(["--ru-data", path], 0, lambda line: None)
    waiting.join(10)
    assert len(failures) == 1
    assert "en.jsonl:301: not JSON" in failures[0]


def test_first_rank_of_another_node_waits_for_the_one_that_works(pipeline):
    from megatron_ru.data.execution import locked

    path, config = pipeline
    found = []
    with locked(config.output):
        other = threading.Thread(target=lambda: found.append(prepare_data(["--ru-data", path], 0, lambda line: None)))
        other.start()
        time.sleep(0.5)
        assert other.is_alive()
    run_pipeline(config)
    other.join(10)
    assert found[0][2:4] == ["--train-data-path", f"{config.output}/train"]
    assert prepare_data([f"--ru-data={path}"], 0, lambda line: None)[1:3] == found[0][2:4]


TRAIN = [
    "--ru-variant",
    "llama3_tiny",
    "--num-layers",
    "2",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
    "--train-iters",
    "6",
    "--lr",
    "3e-3",
    "--eval-iters",
    "1",
    "--eval-interval",
    "3",
    "--log-interval",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.slow
def test_two_ranks_train_on_what_was_made(pipeline, tmp_path):
    path, config = pipeline
    words = [*torchrun(2), "-m", "megatron_ru.pretrain_gpt", *TRAIN, "--ru-data", path]
    words += ["--ru-metrics", str(tmp_path / "metrics.jsonl")]
    shown = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["lm loss"] for line in lines if "lm loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert shown.stdout.count("publish done") == 1
    assert os.path.exists(f"{config.output}/manifest.json")


@pytest.mark.slow
def test_without_training_the_command_ends_well(pipeline):
    path, config = pipeline
    words = [sys.executable, "-m", "megatron_ru.pretrain_gpt", "--ru-data", path]
    shown = subprocess.run(words, env=clean_environment({"RUADAPT_NO_TRAIN": "1"}), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert os.path.exists(f"{config.output}/train.bin")
