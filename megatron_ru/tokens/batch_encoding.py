"""A batch of lines to the ids of its documents, in whatever process that happens."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import MalformedLine, RawLine, parse_object
from megatron_ru.tokens.encoding import Encoder, EncoderCounts


@dataclass(frozen=True, kw_only=True)
class TokeniseSettings:
    """What decides the tokens, and how many processes make them."""

    text_field: str = "text"
    """The field of the JSON object that holds the text."""

    append_eod: bool = True
    """End every document that has tokens with the tokenizer's end-of-document token."""

    workers: int = 1
    """Processes that encode; with 1 the main process does it."""

    fast: bool = True
    """Encode by fastokens where that is installed and gives the same ids; the output does not depend on it."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"the number of workers is {self.workers}; it must be at least 1")


@dataclass
class Batch:
    """Lines for one worker."""

    lines: list[RawLine] = field(default_factory=list)
    text_bytes: int = 0
    stored_bytes: int = 0


@dataclass
class Encoded:
    """A batch's documents, as ids one after the other and lengths, and the lines that were none."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    malformed: list[tuple[str, int, str]]
    counts: EncoderCounts
    """Of this batch."""
    note: str
    """What the encoder has to say about it; mostly nothing."""


def encode_batch(encoder: Encoder, settings: TokeniseSettings, batch: Batch) -> Encoded:
    """The batch's documents and malformed lines.

    Raises UserError, which names the line, when a text cannot be encoded.
    """
    texts: list[str] = []
    places: list[RawLine] = []
    malformed: list[tuple[str, int, str]] = []
    for line in batch.lines:
        try:
            texts.append(str(parse_object(line.content, settings.text_field)[settings.text_field]))
            places.append(line)
        except MalformedLine as error:
            malformed.append((line.file, line.number, str(error)))
    encoder.counts = EncoderCounts()
    notes: list[str] = []
    encoder.report = notes.append
    ids, lengths = _encode_texts(encoder, texts, places)
    if settings.append_eod:
        ids, lengths = _with_end_tokens(ids, lengths, encoder.eos)
    return Encoded(ids, lengths, malformed, encoder.counts, notes[0] if notes else "")


def _with_end_tokens(
    ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32], eos: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """The documents with `eos` behind each that has tokens."""
    assert eos is not None
    filled = lengths > 0
    ends = np.cumsum(lengths, dtype=np.int64)[filled]
    return np.insert(ids, ends, eos), (lengths + filled).astype(np.int32)


def _encode_texts(
    encoder: Encoder, texts: list[str], places: list[RawLine]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """The ids of the texts and their lengths. Raises UserError, which names the line, when one cannot be encoded."""
    try:
        return encoder.encode_flat(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as failure:  # a panic in Rust is a BaseException
        for text, place in zip(texts, places, strict=True):
            try:
                encoder.encode(text)
            except BaseException as error:
                raise UserError(
                    f"{place.file}:{place.number}: the tokenizer {encoder.path} fails on this document of "
                    f"{len(text)} characters: {error!r}"
                ) from None
        raise UserError(f"the tokenizer {encoder.path} failed: {failure!r}") from None
