"""Documents cut into pieces that fit a block: at a paragraph start where there is one."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Pieces(NamedTuple):
    """Stretches of a token array, in its order, without a gap."""

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    hard_cuts: int
    """Pieces that begin within a paragraph, because it is longer than a block."""


def cut_at_paragraphs(
    tokens: npt.NDArray[Any], lengths: npt.NDArray[np.integer[Any]], block: int, line_break: npt.NDArray[np.bool_]
) -> Pieces:
    """The documents of `tokens` [tokens], whose `lengths` add up to it, in pieces of at most `block` tokens.

    A document that fits is one piece. A longer one is cut at the last paragraph start that a block reaches; only a
    paragraph that is longer than a block is cut within. `line_break` [vocabulary] says which ids hold a line break: a
    paragraph starts behind one, and where several follow each other behind the last.
    """
    sizes = lengths.astype(np.int64)
    sizes = sizes[sizes > 0]
    starts = np.cumsum(sizes) - sizes
    long = np.flatnonzero(sizes > block)
    if not len(long):
        return Pieces(starts, sizes, 0)
    hard_cuts = 0
    cut_starts: list[npt.NDArray[np.int64]] = []
    previous = 0
    for document in long:
        cut_starts.append(starts[previous:document])
        cuts, hard = _cuts(tokens[starts[document] : starts[document] + sizes[document]], block, line_break)
        cut_starts.append(starts[document] + cuts)
        hard_cuts += hard
        previous = int(document) + 1
    cut_starts.append(starts[previous:])
    all_starts = np.concatenate(cut_starts)
    total = int(sizes.sum())
    return Pieces(all_starts, np.diff(all_starts, append=total), hard_cuts)


def cut_evenly(lengths: npt.NDArray[np.integer[Any]], block: int) -> Pieces:
    """Each document in rows of `block` tokens, the last one shorter: the thesis's rows before their padding."""
    sizes = lengths.astype(np.int64)
    sizes = sizes[sizes > 0]
    rows = -(-sizes // block)
    first = np.cumsum(rows) - rows
    within = np.arange(int(rows.sum())) - np.repeat(first, rows)
    starts = np.repeat(np.cumsum(sizes) - sizes, rows) + within * block
    piece_sizes = np.minimum(block, np.repeat(sizes, rows) - within * block)
    return Pieces(starts, piece_sizes, int(rows.sum()) - len(sizes))


def paragraph_starts(tokens: npt.NDArray[Any], line_break: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The positions in one document at which a paragraph begins, but for position 0."""
    breaks = line_break[tokens]
    return np.flatnonzero(breaks[:-1] & ~breaks[1:]) + 1


def _cuts(tokens: npt.NDArray[Any], block: int, line_break: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], int]:
    starts = paragraph_starts(tokens, line_break)
    cuts, hard, position = [0], 0, 0
    while len(tokens) - position > block:
        index = int(np.searchsorted(starts, position + block, side="right")) - 1
        if index >= 0 and starts[index] > position:
            position = int(starts[index])
        else:
            position += block
            hard += 1
        cuts.append(position)
    return np.array(cuts, dtype=np.int64), hard
