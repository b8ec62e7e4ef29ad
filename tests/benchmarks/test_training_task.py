import numpy as np
import pytest

from megatron_ru.benchmarks.training.contender import named_settings, our_contender, peer_contender
from megatron_ru.benchmarks.training.random_tokens import write_random_tokens
from megatron_ru.benchmarks.training.task import Task, check_llama
from megatron_ru.foundation.errors import UserError
from megatron_ru.models.variant import find_variant


def task(**changes):
    settings = {
        "variant": "llama3_tiny", "layers": 2, "sequence": 16, "micro_batch": 2, "steps": 8, "device": "cpu",
    }  # fmt: skip
    return Task(**settings | changes)


def test_sizes():
    assert (task().tokens, task().traced) == (32, range(6, 9))
    shape = task(layers=3).shape()
    assert (shape.layers, shape.sequence, shape.vocabulary, shape.heads, shape.kv_heads) == (3, 16, 1024, 8, 4)
    # A context longer than the variant's has positions for it.
    assert task(sequence=1024).architecture().position_count == 1024
    assert Task(**task().json()) == task()


@pytest.mark.parametrize("change", [{"layers": 0}, {"steps": 5}, {"micro_batch": 0}, {"sequence": -1}])
def test_sizes_that_are_none(change):
    with pytest.raises(UserError, match="expected at least"):
        task(**change)


def test_peers_are_llamas():
    check_llama(find_variant("ru_7b3"))
    with pytest.raises(UserError, match="variant gpt2 has positions 'sinusoidal', and the peers"):
        check_llama(find_variant("gpt2"))


def test_commands(tmp_path):
    ours = our_contender(task(), "megatron_ru", ["--ru-ops", "none"], tmp_path / "data")
    words = ours.command(tmp_path / "out.json")
    assert words[1:5] == ["-m", "megatron_ru.pretrain_gpt", "--ru-variant", "llama3_tiny"]
    for flag, value in {"--num-layers": "2", "--global-batch-size": "2", "--train-iters": "8", "--clip-grad": "1.0",
                        "--ru-profile-steps": "6:8", "--ru-profile": str(tmp_path / "out.json"),
                        "--data-path": str(tmp_path / "data")}.items():  # fmt: skip
        assert words[words.index(flag) + 1] == value
    assert "--bf16" in words
    # Behind those of the task, so that they win.
    assert words.index("--ru-ops") > words.index("--bf16")
    peer = peer_contender(task(), "hf")
    assert peer.command(tmp_path / "hf.json")[-1] == str(tmp_path / "hf.json")
    assert (ours.ours, peer.ours) == (True, False)


def test_settings_of_ours():
    assert named_settings(["fp8=--fp8-format hybrid --x 'a b'"]) == {
        "fp8": (["--fp8-format", "hybrid", "--x", "a b"], 1)
    }
    assert named_settings(["tp2@2=--tensor-model-parallel-size 2"])["tp2@2"][1] == 2
    for texts in (["--fp8"], ["=--x"], ["a@b=1"], ["a@0=1"], ["a=1", "a=2"], ["megatron_ru=1"]):
        with pytest.raises(UserError, match="--also"):
            named_settings(texts)


def test_random_tokens_are_a_dataset_with_enough_of_them(tmp_path):
    for name in ("a", "b"):
        write_random_tokens(tmp_path / name, task())
    first, second = ((tmp_path / f"{name}.bin").read_bytes() for name in ("a", "b"))
    assert first == second
    ids = np.frombuffer(first, dtype=np.uint16)
    # Each of 8 steps takes two samples of 16 tokens and a target.
    assert len(ids) >= 8 * 2 * 16 + 1
    assert ids.max() < 1000
    assert len(np.unique(ids)) > 200
