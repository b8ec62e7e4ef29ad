import numpy as np

from megatron_ru.batches.pieces import cut_at_paragraphs, cut_evenly, paragraph_starts

BREAK = 9
LINE_BREAK = np.zeros(10, dtype=bool)
LINE_BREAK[BREAK] = True


def cut(documents, block):
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    pieces = cut_at_paragraphs(tokens, np.array([len(document) for document in documents]), block, LINE_BREAK)
    found = [
        tokens[start : start + length].tolist() for start, length in zip(pieces.starts, pieces.lengths, strict=True)
    ]
    return found, pieces.hard_cuts


def test_a_paragraph_starts_behind_the_last_of_several_line_breaks():
    tokens = np.array([1, 9, 2, 3, 9, 9, 4, 9])
    assert paragraph_starts(tokens, LINE_BREAK).tolist() == [2, 6]


def test_documents_that_fit_are_whole_and_empty_ones_vanish():
    assert cut([[1, 2, 3], [], [4], [5, 9, 6, 7]], 4) == ([[1, 2, 3], [4], [5, 9, 6, 7]], 0)


def test_a_long_document_is_cut_at_the_last_paragraph_that_a_block_reaches():
    found, hard = cut([[8], [1, 9, 2, 9, 3, 3, 9, 4, 4], [7]], 5)
    assert found == [[8], [1, 9, 2, 9], [3, 3, 9, 4, 4], [7]]
    assert hard == 0


def test_a_paragraph_longer_than_a_block_is_cut_within_and_counted():
    found, hard = cut([[1, 9, 2, 2, 2, 2, 2, 2, 2, 9, 3]], 4)
    assert found == [[1, 9], [2, 2, 2, 2], [2, 2, 2, 9], [3]]
    assert hard == 1


def test_rows_of_single_documents():
    pieces = cut_evenly(np.array([5, 0, 2, 4]), 2)
    assert pieces.starts.tolist() == [0, 2, 4, 5, 7, 9]
    assert pieces.lengths.tolist() == [2, 2, 1, 2, 2, 2]
    assert pieces.hard_cuts == 3
