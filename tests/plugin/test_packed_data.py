"""Through Megatron's own GPTDataset and BlendedDataset each sample is one block."""

from argparse import Namespace
from collections import Counter

import numpy as np
import pytest

from megatron_ru.batches.packed import PackedDataset, read_packed, write_packed
from megatron_ru.batches.packing import fill, pack
from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.packed_data import is_packed, packed_data_seams
from megatron_ru.tokens.indexed_dataset import write_dataset

BLOCK, VOCABULARY, EOS, PAD = 16, 90, 2, 3


class Ids:
    """What GPTDataset asks of a tokenizer."""

    unique_identifiers = ("ids",)
    vocab_size = VOCABULARY
    eod = eos = EOS
    pad = PAD


def write_blocks(prefix, kind="lecture", seed=1, pad=PAD):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 40, 120).astype(np.int32)
    tokens = generator.integers(4, VOCABULARY, lengths.sum()).astype(np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOS
    line_break = np.zeros(VOCABULARY, dtype=bool)
    line_break[10] = True
    packing = pack(tokens, lengths, BLOCK, kind, line_break)
    blocks = np.concatenate([some.copy() for some in fill(packing, tokens, pad)])
    with write_dataset(prefix, VOCABULARY) as writer:
        writer.add_documents(blocks.reshape(-1), np.full(len(blocks), BLOCK, dtype=np.int32))
    write_packed(prefix, PackedDataset(block=BLOCK, pad=pad, blocks=len(blocks), tokens=packing.tokens, kind=kind))
    return blocks


def arguments(*prefixes, **changes):
    return Namespace(
        **{"data_path": [str(p) for p in prefixes], "seq_length": BLOCK, "tokenizer_model": None} | changes
    )


@pytest.fixture
def packed_run():
    """A function that installs the seams of a run with these arguments."""
    installed = []

    def install(args):
        for seam in packed_data_seams(args):
            seam.install()
            installed.append(seam)
        return len(installed)

    yield install
    for seam in reversed(installed):
        seam.undo()


def datasets(prefixes, samples, cache, weights=None):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=5, sequence_length=BLOCK, blend=([str(p) for p in prefixes], weights), split="1,0,0",
        tokenizer=Ids(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, path_to_cache=str(cache),
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def check_sample(sample, known):
    """Whether the sample is a block, with the mask that it must have; returns the number of the first such block."""
    tokens, labels, mask = (sample[name].numpy() for name in ("tokens", "labels", "loss_mask"))
    # Megatron shows padding as id 0, which no block holds.
    number = next(n for n, block in enumerate(known) if np.array_equal(np.where(block == PAD, 0, block), tokens))
    block = known[number]
    assert np.array_equal(mask[:-1], block[1:] != PAD)
    assert mask[-1] == 0
    assert np.array_equal(labels[:-1][mask[:-1] == 1], block[1:][block[1:] != PAD])
    return number


@pytest.mark.parametrize("kind", ["lecture", "thesis", "plain"])
def test_each_sample_is_a_block(one_process, packed_run, tmp_path, kind):
    blocks = write_blocks(tmp_path / "ru", kind)
    assert packed_run(arguments(tmp_path / "ru")) == 3
    data = datasets([tmp_path / "ru"], 2 * len(blocks), tmp_path / "cache")
    numbers = [check_sample(data[n], blocks) for n in range(len(data))]
    # Two epochs: every block twice.
    assert Counter(blocks[n].tobytes() for n in numbers) == Counter(row.tobytes() for row in [*blocks, *blocks])


def test_blended(one_process, packed_run, tmp_path):
    known = np.concatenate([write_blocks(tmp_path / name, seed=seed) for seed, name in enumerate(("ru", "en"))])
    packed_run(arguments("0.7", tmp_path / "ru", "0.3", tmp_path / "en"))
    data = datasets([tmp_path / "ru", tmp_path / "en"], 100, tmp_path / "cache", [0.7, 0.3])
    numbers = np.array([check_sample(data[n], known) for n in range(100)])
    assert np.sum(numbers < len(known) / 2) == pytest.approx(70, abs=2)


def test_without_the_seams_targets_come_from_other_blocks_and_the_cache_is_not_shared(
    one_process, packed_run, tmp_path
):
    blocks = write_blocks(tmp_path / "ru")
    stock = datasets([tmp_path / "ru"], len(blocks), tmp_path / "cache")
    assert sum(float(stock[n]["loss_mask"][-1]) for n in range(len(stock))) > len(blocks) / 2
    packed_run(arguments(tmp_path / "ru"))
    data = datasets([tmp_path / "ru"], len(blocks), tmp_path / "cache")
    for n in range(len(data)):
        check_sample(data[n], blocks)


def test_a_dataset_says_itself_that_it_is_packed(tmp_path):
    write_blocks(tmp_path / "ru")
    assert read_packed(tmp_path / "ru").block == BLOCK
    assert read_packed(tmp_path / "en") is None
    assert is_packed(arguments(tmp_path / "ru"))
    assert not is_packed(arguments(tmp_path / "ru", ru_packed=False))
    assert not is_packed(arguments(tmp_path / "en"))
    assert packed_data_seams(arguments()) == []


def test_what_cannot_be_read_as_blocks_is_refused(tmp_path, model_file):
    write_blocks(tmp_path / "ru")
    with pytest.raises(UserError, match=r"en is no packed dataset .* but .*ru is one"):
        is_packed(arguments(tmp_path / "ru", tmp_path / "en"))
    with pytest.raises(UserError, match="but --ru-packed was given"):
        is_packed(arguments(tmp_path / "en", ru_packed=True))
    with pytest.raises(UserError, match="blocks of 16 tokens, but --seq-length is 32"):
        is_packed(arguments(tmp_path / "ru", seq_length=32))
    assert is_packed(arguments(tmp_path / "ru", tokenizer_model=model_file))
    write_blocks(tmp_path / "other", pad=7)
    with pytest.raises(UserError, match=r"padded with the id 7, but .* pads with 3"):
        is_packed(arguments(tmp_path / "other", tokenizer_model=model_file))
    (tmp_path / "ru.packed.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe a packed dataset"):
        is_packed(arguments(tmp_path / "ru"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(["мама мыла раму " * 20], path, TokenizerSettings(vocab_size=290))
    return str(path)
