"""Several tokenizers side by side on the same text, by group of documents; what they do to digits, blanks and words."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import PurePath

from megatron_ru.text.document import Document
from megatron_ru.tokenizer.fertility import Fertility, digit_pieces, has_one_token_per_digit
from megatron_ru.tokenizer.loading import Tokenizer
from megatron_ru.tokenizer.piece_text import byte_level_table, is_byte_level, piece_texts
from megatron_ru.tokens.encoding import Encoder

ALL = "all"
"""The group of every document."""

_BLANKS = {"4 spaces": "x" + " " * 4 + "x", "16 spaces": "x" + " " * 16 + "x", "2 line feeds": "x\n\nx", "tab": "x\tx"}


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What a tokenizer does whatever the text is."""

    vocab_size: int
    one_token_per_digit: bool
    joined_digits: tuple[str, ...]
    """The first few pieces that hold a digit and more."""
    blanks: dict[str, int]
    """Tokens between two letters for each kind of white space."""
    keeps_text: bool
    """Decoding gives back a text with runs of blanks, both forms of й, an emoji and NUL."""


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Everything that is told of tokenizers, by the names given to them."""

    fertility: dict[str, dict[str, Fertility]]
    """By group, then by tokenizer; the first group is `all`."""
    habits: dict[str, Habits]
    overlap: dict[tuple[str, str], float]
    """For each pair, the share of the smaller vocabulary's pieces that the larger one has too."""
    words: dict[str, dict[str, list[str]]]
    """By word, then by tokenizer, the pieces of the word after a blank."""


def report_on(
    encoders: Mapping[str, Encoder], documents: Iterable[Document], by: Sequence[str], words: Sequence[str]
) -> ComparisonReport:
    """The report; `documents` are read once. `by` names fields, or `file`, or `script` (Cyrillic, Latin, other)."""
    tokenizers = {name: encoder.tokenizer for name, encoder in encoders.items()}
    counts: dict[str, dict[str, _Counter]] = {ALL: {name: _Counter() for name in tokenizers}}
    for batch in batched(documents, 64):
        texts = [document.text for document in batch]
        groups = [list(_groups(document, by)) for document in batch]
        for name, encoder in encoders.items():
            for document, names, ids in zip(batch, groups, encoder.encode_batch(texts), strict=True):
                for group in names:
                    row = counts.setdefault(group, {})
                    row.setdefault(name, _Counter()).add(document.text, len(ids))
    ordered = [ALL, *sorted(group for group in counts if group != ALL)]
    return ComparisonReport(
        fertility={group: {name: one.result() for name, one in counts[group].items()} for group in ordered},
        habits={name: _habits(tokenizer) for name, tokenizer in tokenizers.items()},
        overlap=dict(_overlaps(tokenizers)),
        words={word: {name: pieces_of(tokenizer, word) for name, tokenizer in tokenizers.items()} for word in words},
    )


def pieces_of(tokenizer: Tokenizer, word: str) -> list[str]:
    """The pieces of `word` behind a blank, as text; a piece that ends within a character shows its bytes."""
    before, ids = tokenizer.encode("x"), tokenizer.encode(f"x {word}")
    if ids[: len(before)] != before:
        ids = tokenizer.encode(word)
        before = []
    pieces = tokenizer.pieces()
    found = [pieces[token] for token in ids[len(before) :]]
    if not is_byte_level(tokenizer):
        return found
    table = byte_level_table()
    return [bytes(table.get(one, 63) for one in piece).decode("utf-8", "backslashreplace") for piece in found]


class _Counter:
    def __init__(self) -> None:
        self.documents = self.characters = self.bytes = self.words = self.tokens = 0

    def add(self, text: str, tokens: int) -> None:
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text.encode("utf-8"))
        self.words += len(text.split())
        self.tokens += tokens

    def result(self) -> Fertility:
        return Fertility(
            documents=self.documents, characters=self.characters, bytes=self.bytes, words=self.words, tokens=self.tokens
        )


def _groups(document: Document, by: Sequence[str]) -> Iterator[str]:
    yield ALL
    for field in by:
        if field == "file":
            yield f"file {PurePath(document.file).name.partition('.')[0]}"
        elif field == "script":
            yield f"script {_script(document.text)}"
        else:
            yield f"{field} {document.fields.get(field, '—')}"


def _script(text: str) -> str:
    beginning = text[:2000]
    cyrillic, latin = (len(re.findall(pattern, beginning)) for pattern in ("[А-Яа-яЁё]", "[A-Za-z]"))
    if not cyrillic + latin:
        return "other"
    # Russian manuals are full of English names, English ones have no Cyrillic.
    return "Cyrillic" if cyrillic > 0.25 * (cyrillic + latin) else "Latin"


def _habits(tokenizer: Tokenizer) -> Habits:
    hard = "x  \n\n y\tй и\u0306 ё 👩\u200d👩\u200d👧 \0 z"
    return Habits(
        vocab_size=tokenizer.vocab_size,
        one_token_per_digit=has_one_token_per_digit(tokenizer),
        joined_digits=tuple([piece for piece in digit_pieces(tokenizer) if len(piece) > 1][:5]),
        blanks={name: _tokens_between(tokenizer, text) for name, text in _BLANKS.items()},
        keeps_text=tokenizer.decode(tokenizer.encode(hard)) == hard,
    )


def _tokens_between(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of `text`, which begins and ends with a letter, without that of the first letter and that of the last."""
    return len(tokenizer.encode(text)) - len(tokenizer.encode("x")) - 1


def _overlaps(tokenizers: Mapping[str, Tokenizer]) -> Iterator[tuple[tuple[str, str], float]]:
    texts = {name: piece_texts(tokenizer) for name, tokenizer in tokenizers.items()}
    names = list(texts)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            smaller = min(len(texts[first]), len(texts[second]))
            yield (first, second), len(texts[first] & texts[second]) / smaller if smaller else 0.0
