"""How finely a tokenizer cuts text, under two names that cannot be mistaken for one another.

*Characters per token* rises as a vocabulary grows; *tokens per word* falls. Both have been called fertility.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import batched

from megatron_ru.tokenizer.loading import Tokenizer

DIGITS = "0123456789"


@dataclass(frozen=True, kw_only=True)
class Fertility:
    """Counts over some text."""

    documents: int
    characters: int
    """Unicode code points, white space included."""
    bytes: int
    """Of UTF-8."""
    words: int
    """Runs of characters between white space."""
    tokens: int

    @property
    def characters_per_token(self) -> float:
        """Higher is coarser; 0 without tokens."""
        return self.characters / self.tokens if self.tokens else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Higher is coarser, and Russian looks coarser than English: its letters have two bytes. 0 without tokens."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_word(self) -> float:
        """Lower is coarser; 0 without words."""
        return self.tokens / self.words if self.words else 0.0


def measure_fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> Fertility:
    """The counts over `texts`, which are read once."""
    documents = characters = size = words = tokens = 0
    for batch in batched(texts, 64):
        documents += len(batch)
        characters += sum(map(len, batch))
        size += sum(len(text.encode("utf-8")) for text in batch)
        words += sum(len(text.split()) for text in batch)
        tokens += sum(map(len, tokenizer.encode_batch(batch)))
    return Fertility(documents=documents, characters=characters, bytes=size, words=words, tokens=tokens)


def digit_pieces(tokenizer: Tokenizer) -> list[str]:
    """The pieces for text that hold an ASCII digit, sorted: just the ten digits when each stands alone."""
    return sorted({piece for piece in tokenizer.text_pieces() if any(digit in piece for digit in DIGITS)})


def has_one_token_per_digit(tokenizer: Tokenizer) -> bool:
    """Whether the ten digits are the only pieces that hold a digit, and 1234 is encoded as 1, 2, 3, 4."""
    if digit_pieces(tokenizer) != list(DIGITS):
        return False
    pieces = tokenizer.pieces()
    # The first piece may be the space that some tokenizers put before a text.
    return [pieces[token] for token in tokenizer.encode(DIGITS)][-10:] == list(DIGITS)
