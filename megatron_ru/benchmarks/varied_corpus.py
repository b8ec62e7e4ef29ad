"""A large text made of a small one: each repetition differs from the others, so that no cache of words has seen it."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from megatron_ru.foundation.files import atomic_output
from megatron_ru.text.jsonl import read_documents


def write_varied_corpus(
    inputs: Sequence[str | os.PathLike[str]], output: Path, size: int, without: Sequence[str] = ()
) -> tuple[int, int]:
    """Writes at least `size` bytes of JSON lines to `output`; returns the number of documents and of those left out.

    In the first repetition documents are as they are. In the others their lines are in another order, and in each
    line two neighbouring words have changed places and a number has become another. Documents that spell one of
    `without` are left out. Always the same for the same inputs.
    """
    written = documents = left_out = 0
    with atomic_output(output) as stream:
        for text, skipped in _texts(inputs, without):
            left_out += skipped
            if skipped:
                continue
            written += stream.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n")
            documents += 1
            if written >= size:
                break
    return documents, left_out


def _texts(inputs: Sequence[str | os.PathLike[str]], without: Sequence[str]) -> Iterator[tuple[str, bool]]:
    for repetition in count():
        generator = random.Random(repetition)
        empty = True
        for document in read_documents(inputs):
            empty = False
            if any(piece in document.text for piece in without):
                yield "", True
            else:
                yield (_varied(document.text, generator) if repetition else document.text), False
        if empty:
            return


def _varied(text: str, generator: random.Random) -> str:
    lines = text.split("\n")
    generator.shuffle(lines)
    return "\n".join(_varied_line(line, generator) for line in lines)


def _varied_line(line: str, generator: random.Random) -> str:
    words = line.split(" ")
    if len(words) > 2:
        place = generator.randrange(len(words) - 1)
        words[place], words[place + 1] = words[place + 1], words[place]
        place = generator.randrange(len(words))
        if words[place].isdecimal():
            words[place] = str(generator.randrange(10 ** len(words[place])))
    return " ".join(words)
