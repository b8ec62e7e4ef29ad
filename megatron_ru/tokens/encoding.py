"""Text to arrays of token ids, as fast as it can be done without a token being another.
 What a tokenizer's own library gives is the reference. Where the tokenizer is BPE, the package `fastokens` encodes
several times faster, and is held against the reference: on a list of difficult texts when an encoder is loaded, and
ever after on one piece of text in 256, which its content chooses, so that the choice is the same for any number of
processes. Where fastokens raises, the reference encodes that piece; at the first difference the encoder goes over to
the reference for good, and says so. Long texts are cut where the tokenizer cuts anyway (`tokenizer.cutting`).
"""

import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.tokenizer.cutting import cut_rule, cut_text
from megatron_ru.tokenizer.fast import FastEngine, fast_engine
from megatron_ru.tokenizer.loading import Tokenizer, load_tokenizer
from megatron_ru.tokens.indexed_dataset import token_dtype

logger = logging.getLogger(__name__)

_PIECE_CHARACTERS = 1 << 16
"""A text longer than this is cut. fastokens raises on about a million blanks, and takes memory by the piece."""

_GROUP_CHARACTERS = 1 << 20
"""Pieces are encoded in groups of about so many characters: memory holds the ids of the rest two bytes each."""

_CHECK_ONE_IN = 256
"""The reference takes up to forty times as long as fastokens: checking costs 2 to 10%."""


@dataclass(kw_only=True)
class EncoderCounts:
    """What became of the pieces of text; a text that is not long is one piece."""

    pieces: int = 0
    checked: int = 0
    """Encoded both ways."""
    raised: int = 0
    """fastokens gave up, the reference encoded them."""
    differed: int = 0
    """The two disagreed; the reference holds."""
    inexact: int = 0
    """Texts that were cut though that may change a token."""

    def __add__(self, other: "EncoderCounts") -> "EncoderCounts":
        names = [one.name for one in fields(self)]
        return EncoderCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})


def load_encoder(
    path: str | os.PathLike[str], *, fast: bool = True, report: Callable[[str], None] = logger.warning
) -> "Encoder":
    """The encoder for a `.model`, a `tokenizer.json`, or a folder that holds one of them.

    With `fast=False` the tokenizer's own library does everything. `report` gets at most one sentence about pieces on
    which fastokens raised and one about a difference. Raises UserError when there is no tokenizer.
    """
    return Encoder(load_tokenizer(path), fast=fast, report=report)


class Encoder:
    """Made by `load_encoder`. Nothing is added around a text and no control token is recognised in it; it is pickled as
    its path, and loaded again where it arrives."""

    def __init__(
        self, tokenizer: Tokenizer, *, fast: bool = True, report: Callable[[str], None] = logger.warning
    ) -> None:
        self.tokenizer = tokenizer
        """The reference."""
        self.path = tokenizer.path
        self.vocabulary_size = tokenizer.vocab_size
        """One more than the highest id."""
        self.eos = tokenizer.eod
        """The id that ends a document, None when the tokenizer has none."""
        self.pad = tokenizer.pad
        """The id of padding, None when the tokenizer has none."""
        self.dtype = token_dtype(tokenizer.vocab_size)
        """uint16 below 65500 ids, else int32."""
        self.counts = EncoderCounts()
        self._wants_fast = fast
        self.report = report
        """Gets a sentence when fastokens is given up for one piece (the first time) or for good."""
        self._cut = cut_rule(tokenizer)
        self._fast: FastEngine | None = None
        self.slow_reason = "fast encoding is switched off"
        """Why the reference does everything; empty where it does not."""
        if fast:
            self._fast, self.slow_reason = fast_engine(tokenizer)

    def encode(self, text: str) -> npt.NDArray[Any]:
        """The ids of `text`, `dtype` [tokens]."""
        return self.encode_flat([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """`encode` of each text; the arrays are views of one."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """The ids of all texts one after the other, `dtype` [tokens], and how many each has, int32 [texts]."""
        if self._cut is None or all(len(text) <= max(_PIECE_CHARACTERS, self._cut.above) for text in texts):
            return self._encode(texts)
        parts = []
        lengths = np.zeros(len(texts), dtype=np.int32)
        for owners, pieces in self._groups(texts):
            ids, counts = self._encode(pieces)
            parts.append(ids)
            np.add.at(lengths, owners, counts)
        return np.concatenate(parts), lengths

    def _groups(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
        """Pieces in order with the numbers of their texts, a group at a time."""
        assert self._cut is not None
        owners: list[int] = []
        pieces: list[str] = []
        size = 0
        for number, text in enumerate(texts):
            if self._cut.above and len(text) > self._cut.above:
                self._count_inexact(text)
            for piece in cut_text(text, self._cut, max(_PIECE_CHARACTERS, self._cut.above)):
                owners.append(number)
                pieces.append(piece)
                size += len(piece)
                if size >= _GROUP_CHARACTERS:
                    yield owners, pieces
                    owners, pieces, size = [], [], 0
        if pieces:
            yield owners, pieces

    def _encode(self, pieces: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        self.counts.pieces += len(pieces)
        if self._fast is None:
            return self._encode_by_reference(pieces)
        try:
            ids, lengths = self._fast.encode_flat(pieces)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is a BaseException
            if len(pieces) == 1:
                self._count_raised(pieces[0], error)
                return self._encode_by_reference(pieces)
            parts = [self._encode([piece]) for piece in pieces]
            self.counts.pieces -= len(pieces)
            return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])
        if not self._agrees(pieces, ids, lengths):
            return self._encode_by_reference(pieces)
        return ids.astype(self.dtype), lengths

    def _encode_by_reference(self, pieces: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        found = self.tokenizer.encode_batch(pieces)
        lengths = np.fromiter(map(len, found), dtype=np.int32, count=len(found))
        return np.fromiter(chain.from_iterable(found), dtype=self.dtype, count=int(lengths.sum())), lengths

    def _agrees(self, pieces: Sequence[str], ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> bool:
        """Whether the reference gives the same ids for the pieces that are checked; if not, fastokens is dropped."""
        chosen = [number for number, piece in enumerate(pieces) if _is_checked(piece)]
        if not chosen:
            return True
        self.counts.checked += len(chosen)
        ends = np.cumsum(lengths)
        expected = self.tokenizer.encode_batch([pieces[number] for number in chosen])
        for number, wanted in zip(chosen, expected, strict=True):
            if not np.array_equal(ids[ends[number] - lengths[number] : ends[number]], wanted):
                self._fast = None
                self.slow_reason = "fastokens gave other ids than the tokenizer's own library"
                self.counts.differed += 1
                self.report(
                    f"{self.path}: fastokens gives other ids than the tokenizer's own library on a text that begins "
                    f"{pieces[number][:60]!r}; the library, which is slower, encodes from here on"
                )
                return False
        return True

    def _count_raised(self, piece: str, error: BaseException) -> None:
        self.counts.raised += 1
        if self.counts.raised == 1:
            self.report(
                f"{self.path}: fastokens gives up on a text of {len(piece)} characters that begins {piece[:60]!r} "
                f"({error}); the tokenizer's own library encodes it, and others like it"
            )

    def _count_inexact(self, text: str) -> None:
        self.counts.inexact += 1
        if self.counts.inexact == 1:
            self.report(
                f"{self.path}: a text of {len(text)} characters is encoded in pieces; a unigram model may make a few "
                "other tokens of it than of the whole, where costs are equal but for rounding"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (self.path, self._wants_fast)


def _load_again(path: str, fast: bool) -> Encoder:
    return load_encoder(path, fast=fast)


def _is_checked(piece: str) -> bool:
    # The beginning is enough to choose by, and unlike hash() it is the same in every process.
    return zlib.crc32(piece[:256].encode("utf-8", "surrogatepass"), len(piece)) % _CHECK_ONE_IN == 0
