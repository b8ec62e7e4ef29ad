"""Training BPE and unigram tokenizers with sentencepiece.

Ids 0 to 3 are `<unk>`, `<s>`, `</s>` and `<pad>`. Each digit is a token of its own (1234 becomes 1, 2, 3, 4;
all ten are always in the vocabulary), bytes stand in for characters that are not in it, so that nothing is
ever unknown, and white space is kept: decoding gives back what was encoded, and a run of spaces is text. A
line break is one token, the byte 0x0A.

The same text and settings give the same file on any machine: sentencepiece's sum over threads depends on how
many there are, so their number is fixed and not taken from the processor, and sampling is ours, with a seed.
"""

import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import requested_output

ModelType = Literal["bpe", "unigram"]
Normalization = Literal["identity", "nfc", "nfkc", "nmt_nfkc"]

SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>")
"""The control pieces; the index is the id."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What decides the vocabulary besides the text. Raises UserError when a value is not possible."""

    model_type: ModelType = "bpe"
    """`bpe` merges the most frequent pairs, `unigram` prunes a large vocabulary by likelihood."""

    vocab_size: int = 32000
    """Number of ids, with the 4 control pieces and the 256 bytes."""

    normalization: Normalization = "identity"
    """`identity` keeps every character; `nfc` (Hugging Face only) unifies й and и with a breve, `nfkc` compatible forms
    too (ﬁ becomes fi), `nmt_nfkc` (sentencepiece only) also kinds of blanks."""

    special_tokens: tuple[str, ...] = ()
    """Further control tokens, from id 4 on; never found in text."""

    longest_piece: int = 16
    """Characters; with Hugging Face's BPE bytes, twice as many."""

    character_coverage: float = 0.9995
    """The share of characters in the text that get a piece; the rest is spelled in bytes."""

    max_sentences: int = 2_000_000
    """Lines to learn from; of more, this many are drawn at random (memory: about 1 kB each)."""

    seed: int = 1234
    """Of that draw."""

    threads: int = 16
    """Threads of sentencepiece; the unigram result depends on it in the last digits."""

    def __post_init__(self) -> None:
        if self.model_type not in get_args(ModelType):
            raise UserError(f"unknown model type {self.model_type!r}: choose one of {', '.join(get_args(ModelType))}")
        if self.normalization not in get_args(Normalization):
            known = ", ".join(get_args(Normalization))
            raise UserError(f"unknown normalization {self.normalization!r}: choose one of {known}")
        if self.vocab_size < 1:
            raise UserError(f"the vocabulary size is {self.vocab_size}; it must be positive")
        if not 0 < self.character_coverage <= 1:
            raise UserError(f"the character coverage is {self.character_coverage}; it must lie in (0, 1]")
        if self.longest_piece < 1:
            raise UserError(f"the longest piece has {self.longest_piece} characters; it must have at least 1")
        wrong = [token for token in self.special_tokens if not token.strip() or token in SPECIAL_PIECES]
        if wrong or len(set(self.special_tokens)) < len(self.special_tokens):
            raise UserError(
                f"the special tokens {list(self.special_tokens)} must differ from one another, from blanks and from "
                f"{', '.join(SPECIAL_PIECES)}"
            )
        if self.max_sentences < 1:
            raise UserError(f"the number of sentences to learn from is {self.max_sentences}; it must be positive")


def train_tokenizer(texts: Iterable[str], output: str | os.PathLike[str], settings: TokenizerSettings) -> int:
    """Writes the sentencepiece model learned from `texts` to `output` and returns the number of lines used.

    Raises UserError when the text is empty, or too little for the vocabulary (naming the size that it is
    enough for), or the output cannot be written.
    """
    if str(output).endswith(".json"):
        raise UserError(f"{output} would be taken for a Hugging Face tokenizer; call the output FILE.model")
    if settings.normalization == "nfc":
        raise UserError("sentencepiece has no rule nfc: choose nfkc, or a folder as the output for Hugging Face's")
    sample = _reservoir(_lines(texts), settings.max_sentences, random.Random(settings.seed))
    if not sample:
        raise UserError("there is no text to learn a tokenizer from: every document is empty")
    # Opened before the training: that a folder cannot be written should not be found out after an hour.
    with requested_output(output) as stream:
        stream.write(_train(sample, settings))
    return len(sample)


def _train(sample: list[str], settings: TokenizerSettings) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            normalization_rule_name=settings.normalization,
            character_coverage=settings.character_coverage,
            num_threads=settings.threads,
            split_digits=True,
            required_chars="0123456789",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # _lines has cut what is longer, so that sentencepiece need not drop it.
            max_sentence_length=_LONGEST_LINE_BYTES,
            unk_id=SPECIAL_PIECES.index("<unk>"),
            bos_id=SPECIAL_PIECES.index("<s>"),
            eos_id=SPECIAL_PIECES.index("</s>"),
            pad_id=SPECIAL_PIECES.index("<pad>"),
            control_symbols=list(settings.special_tokens),
            max_sentencepiece_length=settings.longest_piece,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, settings, len(sample)) from None
    return model.getvalue()


# sentencepiece's own default. Pieces are at most 16 characters long, so a cut costs nothing.
_LONGEST_LINE_BYTES = 4192
_LONGEST_LINE_CHARACTERS = _LONGEST_LINE_BYTES // 4  # a character has at most 4 bytes


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of `texts` that are not blank, in pieces that sentencepiece takes whole."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE_CHARACTERS):
                piece = line[start : start + _LONGEST_LINE_CHARACTERS].replace("\0", "")
                if piece and not piece.isspace():
                    yield piece


def _reservoir(items: Iterable[str], size: int, generator: random.Random) -> list[str]:
    """`size` of `items`, each with the same probability; all, in order, when there are no more than that.

    Algorithm R: J. S. Vitter, Random Sampling with a Reservoir, ACM TOMS 11 (1985).
    """
    kept: list[str] = []
    for index, item in enumerate(items):
        if index < size:
            kept.append(item)
        else:
            slot = generator.randrange(index + 1)
            if slot < size:
                kept[slot] = item
    return kept


def _explained(error: RuntimeError, settings: TokenizerSettings, lines: int) -> UserError:
    """sentencepiece's complaint in a sentence that says what to do."""
    message = str(error)
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return UserError(
            f"a vocabulary of {settings.vocab_size} is too large for this text: its {lines} lines are enough "
            f"for {found[1]} {settings.model_type} pieces; pass --vocab-size {found[1]} or less, or more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"a vocabulary of {settings.vocab_size} is too small: the characters of this text, the 256 bytes "
            f"and the {len(SPECIAL_PIECES)} control pieces need {found[1]}; pass that --vocab-size or more"
        )
    return UserError(f"sentencepiece could not train the tokenizer: {message}")
