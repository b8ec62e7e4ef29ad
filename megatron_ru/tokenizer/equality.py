"""Whether two tokenizers give the same ids, looked at on text."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched, chain

from megatron_ru.tokenizer.difficult_texts import difficult_texts
from megatron_ru.tokenizer.loading import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Comparison:
    texts: int
    tokens: int
    """Of the first tokenizer."""
    differing: int
    """Texts."""
    example: str
    """The first difference: some text around it and what each makes of it; empty without one."""


def compare(first: Tokenizer, second: Tokenizer, texts: Iterable[str]) -> Comparison:
    """What the two make of `texts`, which are read once."""
    count = tokens = differing = 0
    example = ""
    for batch in batched(texts, 64):
        for ours, theirs in zip(first.encode_batch(batch), second.encode_batch(batch), strict=True):
            count += 1
            tokens += len(ours)
            if ours != theirs:
                differing += 1
                example = example or _example(first, second, ours, theirs)
    return Comparison(texts=count, tokens=tokens, differing=differing, example=example)


def texts_to_compare(tokenizer: Tokenizer, texts: Iterable[str], seed: int = 0) -> Iterator[str]:
    """`texts`, each followed by a damaged copy of its beginning; before them the difficult texts and the vocabulary.

    A damaged copy has characters doubled, dropped and swapped, and bits of the vocabulary strewn in: text as it is
    leaves most of a tokenizer untried.
    """
    pieces = [piece.replace("▁", " ") for piece in tokenizer.text_pieces()]
    generator = random.Random(seed)
    yield from difficult_texts(tokenizer.control_pieces())
    yield from ("".join(batch) for batch in batched(pieces, 20))
    yield from chain.from_iterable((text, _damaged(text[:2000], pieces, generator)) for text in texts)


def _damaged(text: str, pieces: list[str], generator: random.Random) -> str:
    characters = list(text)
    for _ in range(1 + len(characters) // 20):
        place = generator.randrange(len(characters) + 1)
        match generator.randrange(4):
            case 0:
                characters.insert(place, generator.choice(pieces))
            case 1 if characters:
                characters[place : place + 1] = characters[place : place + 1] * generator.randrange(2, 12)
            case 2:
                del characters[place : place + 1]
            case _:
                characters[place : place + 2] = characters[place : place + 2][::-1]
    return "".join(characters)


def _example(first: Tokenizer, second: Tokenizer, ours: list[int], theirs: list[int]) -> str:
    shorter = min(len(ours), len(theirs))
    place = next((at for at in range(shorter) if ours[at] != theirs[at]), shorter)
    start = max(place - 3, 0)
    shown = []
    for tokenizer, ids in ((first, ours), (second, theirs)):
        pieces = tokenizer.pieces()
        shown.append(" ".join(repr(pieces[token]) for token in ids[start : place + 5]))
    return f"{first.decode(ours[start : place + 5])!r} is {shown[0]} and {shown[1]}"
