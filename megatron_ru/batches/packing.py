"""Documents of token ids packed into blocks of one length, in one of three ways."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_ru.batches.best_fit import best_fit_decreasing
from megatron_ru.batches.pieces import Pieces, cut_at_paragraphs, cut_evenly
from megatron_ru.foundation.errors import UserError

PackingKind = Literal["lecture", "thesis", "plain"]

# Blocks filled before they are handed on: some megabytes.
_BLOCKS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Blocks before their tokens are copied. No token is dropped by any kind."""

    block: int
    blocks: int
    tokens: int
    """Real ones; the rest of `block * blocks` is padding."""
    hard_cuts: int
    """Blocks and pieces that begin within a paragraph."""
    order: npt.NDArray[np.int64]
    """Pieces in the order in which the blocks hold them."""
    pieces: Pieces
    piece_blocks: npt.NDArray[np.int64]
    """The block of each piece, in the order of `order`."""

    @property
    def padding(self) -> int:
        """Padding tokens."""
        return self.block * self.blocks - self.tokens


def pack(
    tokens: npt.NDArray[Any],
    lengths: npt.NDArray[np.integer[Any]],
    block: int,
    kind: PackingKind,
    line_break: npt.NDArray[np.bool_],
) -> Packing:
    """How the documents of `tokens` [tokens] with these `lengths` fill blocks of `block` tokens.

    `lecture`: every block begins at the start of a document or a paragraph, best fit, few padding tokens.
    `thesis`: each document in rows of its own, the tail padded. `plain`: one document behind the other, cut anywhere.
    `line_break` [vocabulary] says which ids hold a line break.
    """
    if block < 2:
        raise UserError(f"the block is {block} tokens; it must be at least 2, a token and its successor")
    if kind == "lecture":
        pieces = cut_at_paragraphs(tokens, lengths, block, line_break)
        blocks = best_fit_decreasing(pieces.lengths, block)
    elif kind == "thesis":
        pieces = cut_evenly(lengths, block)
        blocks = np.arange(len(pieces.starts))
    elif kind == "plain":
        pieces = cut_evenly(np.array([len(tokens)]), block)
        blocks = np.arange(len(pieces.starts))
    else:
        raise UserError(f"unknown packing {kind!r}; known packings: lecture, plain, thesis")
    order = np.argsort(blocks, kind="stable")
    return Packing(
        block=block, blocks=int(blocks.max()) + 1 if len(blocks) else 0, tokens=int(pieces.lengths.sum()),
        hard_cuts=pieces.hard_cuts, order=order, pieces=pieces, piece_blocks=blocks[order],
    )  # fmt: skip


def fill(packing: Packing, tokens: npt.NDArray[Any], pad: int) -> Iterator[npt.NDArray[Any]]:
    """Yields the blocks in order, [up to 512, block] of the dtype of `tokens`, padded with `pad` at their ends.

    The array is used again for the next ones.
    """
    size = packing.block
    buffer = np.empty((min(_BLOCKS_AT_ONCE, packing.blocks), size), dtype=tokens.dtype)
    flat = buffer.reshape(-1)
    starts = packing.pieces.starts[packing.order]
    lengths = packing.pieces.lengths[packing.order]
    # Where each piece lies: behind those of its block.
    ends = np.cumsum(lengths)
    block_first = np.searchsorted(packing.piece_blocks, packing.piece_blocks, side="left")
    within = ends - lengths - (ends - lengths)[block_first]
    targets = packing.piece_blocks * size + within
    for first_block in range(0, packing.blocks, _BLOCKS_AT_ONCE):
        last_block = min(first_block + _BLOCKS_AT_ONCE, packing.blocks)
        low, high = np.searchsorted(packing.piece_blocks, (first_block, last_block))
        flat.fill(pad)
        shift = first_block * size
        moves = zip(
            (targets[low:high] - shift).tolist(), starts[low:high].tolist(), lengths[low:high].tolist(), strict=True
        )
        for target, start, length in moves:
            flat[target : target + length] = tokens[start : start + length]
        yield buffer[: last_block - first_block]
