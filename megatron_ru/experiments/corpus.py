"""Text, a tokenizer made for it, and its tokens as Megatron reads them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_ru.text.document import Document
from megatron_ru.text.jsonl import MalformedLines, read_documents, require_readable_file, write_documents
from megatron_ru.text.wordnet import wordnet_documents
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer
from megatron_ru.tokens.tokenise import TokeniseSettings, tokenise


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where things are."""

    tokenizer: Path
    prefix: Path
    """Of .bin and .idx."""
    documents: int
    tokens: int


def write_dictionary(path: Path, entries: int | None) -> int:
    """Writes the first entries of the Russian dictionary as JSON Lines and returns their number.

    Any stretch of it is a fair sample of the whole. Raises UserError when wiki-ru-wordnet is missing.
    """
    return write_documents(path, islice(wordnet_documents(), entries))


def make_tokenizer(text: Path, path: Path, vocab_size: int, text_field: str = "text") -> int:
    """Trains a BPE tokenizer with one token per digit on JSON Lines and returns the number of lines it learned from."""
    settings = TokenizerSettings(model_type="bpe", vocab_size=vocab_size)
    return train_tokenizer(_texts(read_documents([text], text_field, MalformedLines())), path, settings)


def make_dataset(text: Path, tokenizer: Path, prefix: Path, workers: int) -> Corpus:
    """Tokenises JSON Lines to .bin and .idx."""
    require_readable_file(text)
    found = tokenise([text], tokenizer, prefix, TokeniseSettings(workers=workers))
    return Corpus(tokenizer=tokenizer, prefix=prefix, documents=found.documents, tokens=found.tokens)


def _texts(documents: Iterable[Document]) -> Iterable[str]:
    return (document.text for document in documents)
