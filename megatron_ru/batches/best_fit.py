"""Pieces into as few blocks as best-fit decreasing makes of them."""

from typing import Any

import numpy as np
import numpy.typing as npt


def best_fit_decreasing(lengths: npt.NDArray[np.integer[Any]], block: int) -> npt.NDArray[np.int64]:
    """The block of each piece, int64 [pieces]; blocks are numbered by their earliest piece.

    The longest piece comes first, each into the fullest block that still holds it (D. S. Johnson, Near-optimal bin
    packing algorithms, 1973; for training data H. Ding and others, Fewer Truncations Improve Language Modeling, 2024).
    The spaces in open blocks are a set of at most `block` numbers, kept as the bits of one integer, so that the
    smallest that is large enough is found by two operations. Every length lies in [1, block].
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    blocks = [0] * len(order)
    open_blocks: list[list[int]] = [[] for _ in range(block + 1)]
    spaces = 0
    made = 0
    for piece, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            candidates = open_blocks[space]
            chosen = candidates.pop()
            if not candidates:
                spaces ^= 1 << space
        else:
            chosen, space = made, block
            made += 1
        blocks[piece] = chosen
        if rest := space - size:
            open_blocks[rest].append(chosen)
            spaces |= 1 << rest
    return _by_first_piece(np.array(blocks, dtype=np.int64), made)


def _by_first_piece(blocks: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    first = np.full(count, len(blocks), dtype=np.int64)
    np.minimum.at(first, blocks, np.arange(len(blocks)))
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(count)
    return rank[blocks]
