"""Which checkpoints are refused, and how; the loading itself is tested on a trained one."""

from argparse import Namespace

import pytest

from megatron_ru.commands.main import main
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer


def refused(folder, capfd, *words):
    """The sentence with which `generate` refuses a checkpoint."""
    assert main(["generate", "--load", str(folder), "--device", "cpu", *words]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    prefix = "megatron-ru: error: "
    assert captured.err.startswith(prefix)
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix(prefix).strip()


def test_no_folder(tmp_path, capfd, cpu_device):
    assert refused(tmp_path / "none", capfd) == (
        f"{tmp_path / 'none'} is not a folder, expected a folder that pretrain_gpt --save wrote a checkpoint to"
    )


def test_no_checkpoint(tmp_path, capfd, cpu_device):
    assert "has no latest_checkpointed_iteration.txt, expected a folder that pretrain_gpt" in refused(tmp_path, capfd)


def test_checkpoint_that_is_gone(tmp_path, capfd, cpu_device):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("20\n")
    assert refused(tmp_path, capfd) == (
        f"{tracker} names the checkpoint '20', and there is no folder {tmp_path / 'iter_0000020'}"
    )


def test_other_format(tmp_path, capfd, cpu_device):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    (tmp_path / "iter_0000020" / "mp_rank_00").mkdir(parents=True)
    assert "iter_0000020 has no metadata.json of the torch_dist format" in refused(tmp_path, capfd)


def test_damaged_checkpoint(tmp_path, capfd, cpu_device):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    place = tmp_path / "iter_0000020"
    place.mkdir()
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (place / ".metadata").write_bytes(b"damaged")
    message = refused(tmp_path, capfd)
    assert message.startswith(f"the checkpoint {place} cannot be read (")
    assert message.endswith("); save the model again")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that makes `--load` see a checkpoint whose run had these arguments."""
    from megatron_ru.engines import generation

    def make(**arguments):
        model = generation.SavedModel(folder=tmp_path, iteration="20", arguments=Namespace(**arguments))
        monkeypatch.setattr(generation, "find_checkpoint", lambda load: model)
        return tmp_path

    return make


def test_another_variant(saved, capfd, cpu_device):
    folder = saved(ru_variant="ru_demo")
    assert refused(folder, capfd, "--ru-variant", "llama2_7b") == (
        f"the checkpoint in {folder} is of --ru-variant ru_demo, not llama2_7b; "
        "drop the flag, or load another checkpoint"
    )


def test_tokenizer_that_has_moved(saved, capfd, cpu_device, tmp_path):
    folder = saved(ru_variant="ru_demo", tokenizer_model=str(tmp_path / "gone.model"))
    assert refused(folder, capfd) == (
        f"the checkpoint in {folder} names {tmp_path / 'gone.model'}, which is not here: give its tokenizer with "
        "--tokenizer-model FILE"
    )


def test_tokenizer_that_is_too_large(saved, capfd, cpu_device, tmp_path):
    path = tmp_path / "a.model"
    train_tokenizer(["кошка собака"] * 10, path, TokenizerSettings(vocab_size=285))
    folder = saved(ru_variant="ru_demo", tokenizer_model=None, padded_vocab_size=256)
    assert refused(folder, capfd, "--tokenizer-model", str(path)) == (
        f"the tokenizer {path} has 285 ids, but the model in {folder} has 256 rows for them; give the tokenizer that "
        "it was trained with"
    )


def test_impossible_sampling(saved, capfd, cpu_device):
    assert refused(saved(), capfd, "--top-p", "2") == "--top-p is 2.0, expected more than 0 and at most 1"
