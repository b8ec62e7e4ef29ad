"""Bad input to a training run: one clear sentence, exit code 2, nothing half-written, no traceback."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megatron_ru.tokens.indexed_dataset import write_dataset
from tests.training_runs import clean_environment


@pytest.fixture
def refuse(trainer, tmp_path):
    """Runs the training that must be refused and returns its sentence."""

    def run(*words, environment=None):
        save = tmp_path / "checkpoints"
        done = subprocess.run(
            [sys.executable, "-m", "megatron_ru.pretrain_gpt", *trainer.words(*words, name="refused", steps=2),
             "--save", str(save), "--save-interval", "1"],
            env=clean_environment(environment), cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert not save.exists()
        assert not (trainer.folder / "refused.jsonl").exists()
        sentences = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(sentences) == 1, done.stderr
        return sentences[0].partition("error: ")[2]

    return run


def test_unknown_variant(refuse):
    sentence = refuse("--ru-variant", "lama2_tiny")
    assert "'lama2_tiny'" in sentence
    assert "did you mean llama2_tiny" in sentence


def test_flag_that_contradicts_the_variant(refuse):
    sentence = refuse("--ru-variant", "llama2_tiny", "--normalization", "LayerNorm")
    assert "--normalization LayerNorm contradicts --ru-variant llama2_tiny, which decides RMSNorm" in sentence


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (("--hidden-size", "130"), ("130", "8")),
        (("--tensor-model-parallel-size", "2"), ("1", "2")),
        (("--global-batch-size", "7"), ("7", "2")),
    ],
)
def test_indivisible_sizes(refuse, words, numbers):
    sentence = refuse(*words)
    assert all(number in sentence for number in numbers), sentence


def test_missing_dataset(refuse, tmp_path):
    sentence = refuse("--data-path", str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing.bin") in sentence
    assert "megatron-ru data tokenize" in sentence


def test_truncated_dataset(refuse, trainer, tmp_path):
    shutil.copy(f"{trainer.prefix}.idx", tmp_path / "cut.idx")
    whole = (trainer.folder / "text.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-101])
    sentence = refuse("--data-path", str(tmp_path / "cut"))
    assert "cut.bin is truncated" in sentence
    assert f"{len(whole)} bytes" in sentence
    assert f"has {len(whole) - 101}" in sentence


def test_dataset_of_a_larger_vocabulary(refuse, tmp_path):
    ids = np.arange(1000, dtype=np.uint16)
    with write_dataset(tmp_path / "foreign", vocab_size=1000) as writer:
        writer.add_documents(ids, np.array([1000], dtype=np.int32))
    sentence = refuse("--data-path", str(tmp_path / "foreign"))
    assert "token id 999" in sentence
    assert "another tokenizer" in sentence


def test_tokenizer_that_cannot_be_read(refuse, tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    assert "broken.model is not a sentencepiece model" in refuse("--tokenizer-model", str(tmp_path / "broken.model"))


def test_unreadable_jsonl_leaves_no_dataset(trainer, tmp_path):
    source = tmp_path / "bad.jsonl"
    source.write_text(json.dumps({"text": "строка"}) + "\n{'text': 1}\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ru", "data", "tokenize", "--input", str(source),
         "--tokenizer", str(trainer.tokenizer), "--output", str(tmp_path / "out")],
        env=clean_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{source}:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_contradictory_ranks(refuse):
    sentence = refuse(environment={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": "29999", "OMPI_COMM_WORLD_RANK": "0",
                                   "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})  # fmt: skip
    assert "RANK" in sentence
    assert "OMPI_COMM_WORLD_RANK" in sentence


def test_flag_that_our_entry_does_not_carry_out(refuse):
    sentence = refuse("--sft")
    assert sentence.startswith("--sft was given, which megatron-ru pretrain_gpt does not carry out")
    assert "run_host" in sentence
