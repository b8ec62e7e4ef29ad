import numpy as np
import pytest

from megatron_ru.batches.packing import fill, pack
from megatron_ru.batches.pieces import paragraph_starts
from megatron_ru.foundation.errors import UserError

PAD, EOS, BREAK = 3, 2, 10
LINE_BREAK = np.zeros(1000, dtype=bool)
LINE_BREAK[BREAK] = True


def documents(count, mean, seed=1):
    """Ids with a line break every twelfth token or so, each document ended by EOS."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(np.log(mean), 1, count).astype(np.int32) + 2
    tokens = generator.integers(11, 1000, lengths.sum()).astype(np.uint16)
    tokens[generator.random(len(tokens)) < 1 / 12] = BREAK
    tokens[np.cumsum(lengths) - 1] = EOS
    return tokens, lengths


def packed(tokens, lengths, block, kind):
    packing = pack(tokens, lengths, block, kind, LINE_BREAK)
    return packing, np.concatenate([blocks.copy() for blocks in fill(packing, tokens, PAD)])


@pytest.mark.parametrize("kind", ["lecture", "thesis", "plain"])
@pytest.mark.parametrize(("count", "mean"), [(700, 20), (60, 900), (1, 5)])
def test_every_token_is_kept_and_counted(kind, count, mean):
    tokens, lengths = documents(count, mean)
    packing, blocks = packed(tokens, lengths, 128, kind)
    assert blocks.shape == (packing.blocks, 128)
    assert packing.tokens == len(tokens)
    assert packing.padding == np.count_nonzero(blocks == PAD)
    assert np.array_equal(np.sort(blocks[blocks != PAD]), np.sort(tokens))


def test_every_lecture_block_begins_at_a_document_or_a_paragraph():
    tokens, lengths = documents(400, 300)
    packing, blocks = packed(tokens, lengths, 256, "lecture")
    begins = set()
    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
        for start in (0, *paragraph_starts(document, LINE_BREAK)):
            begins.add(tuple(document[start : start + 6].tolist()))
    wrong = [row for row in blocks.tolist() if not any(tuple(row[:n]) in begins for n in range(1, 7))]
    assert wrong == []
    assert packing.hard_cuts == 0


def test_half_a_percent_of_padding_at_4096():
    """Documents of 800 tokens in the median, some of several blocks."""
    tokens, lengths = documents(4000, 800)
    packing, blocks = packed(tokens, lengths, 4096, "lecture")
    assert (lengths > 4096).sum() > 100
    assert packing.padding / blocks.size < 0.005
    assert packing.hard_cuts == 0


def test_paragraphs_longer_than_a_block_are_counted():
    tokens = np.full(1000, 20, dtype=np.uint16)
    packing, _ = packed(tokens, np.array([1000]), 256, "lecture")
    assert packing.hard_cuts == 3


def test_thesis_rows_are_of_one_document_with_padding_behind():
    tokens = np.arange(20, 30, dtype=np.uint16)
    _, blocks = packed(tokens, np.array([5, 2, 3]), 4, "thesis")
    assert blocks.tolist() == [[20, 21, 22, 23], [24, 3, 3, 3], [25, 26, 3, 3], [27, 28, 29, 3]]


def test_plain_blocks_are_the_text_itself():
    tokens, lengths = documents(50, 40)
    _, blocks = packed(tokens, lengths, 64, "plain")
    assert np.array_equal(blocks.reshape(-1)[: len(tokens)], tokens)


def test_more_blocks_than_are_filled_at_once():
    tokens, lengths = documents(3000, 30)
    packing, blocks = packed(tokens, lengths, 32, "lecture")
    assert packing.blocks > 2 * 512
    assert np.array_equal(np.sort(blocks[blocks != PAD]), np.sort(tokens))


def test_wrong_settings():
    with pytest.raises(UserError, match="the block is 1 tokens"):
        pack(np.zeros(3, np.uint16), np.array([3]), 1, "lecture", LINE_BREAK)
    with pytest.raises(UserError, match="unknown packing 'best'; known packings: lecture, plain, thesis"):
        pack(np.zeros(3, np.uint16), np.array([3]), 4, "best", LINE_BREAK)
