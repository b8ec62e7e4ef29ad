"""A sample of a large text, drawn in one pass by the weights of its domains, in the memory of the sample.

Every document has a number that its text and the seed give; of each domain those with the smallest numbers are kept,
as many as fill the domain's share. So the sample depends neither on the order of files nor on how they are cut into
shards, and a larger sample contains the smaller one.
"""

import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.document import Document

BY_FILE = "file"
"""As the domain field: the name of the file, up to its first dot."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How much is drawn, and of what. Raises UserError when a value is not possible."""

    characters: int
    """Of the whole sample; it is exceeded by less than one document for each domain."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """By domain, in any unit; domains that are not named are left out. Empty: one share for all documents."""

    domain_field: str = "domain"
    """The field of a document that names its domain, or `file`."""

    seed: int = 1234

    def __post_init__(self) -> None:
        if self.characters < 1:
            raise UserError(f"the sample has {self.characters} characters; it must have at least 1")
        for domain, weight in self.weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"the weight of {domain!r} is {weight}; it must be a positive number")


@dataclass(kw_only=True)
class Share:
    """What was drawn of a domain."""

    wanted: int
    """Characters."""
    drawn: int = 0
    """Characters; fewer than wanted when the domain has no more."""
    documents: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    texts: list[str]
    """Domain after domain, in the order of their numbers."""
    shares: dict[str, Share]
    left_out: int
    """Documents of domains without a weight."""


def draw_sample(documents: Iterable[Document], settings: SampleSettings) -> Sample:
    """The sample of `documents`, which are read once.

    Raises UserError when a domain with a weight has no document.
    """
    total = sum(settings.weights.values())
    shares = {
        domain: Share(wanted=round(settings.characters * weight / total)) for domain, weight in settings.weights.items()
    } or {"": Share(wanted=settings.characters)}
    kept: dict[str, _Smallest] = {domain: _Smallest(share.wanted) for domain, share in shares.items()}
    seen: dict[str, int] = {}
    left_out = 0
    for document in documents:
        domain = _domain(document, settings.domain_field) if settings.weights else ""
        if domain in kept:
            kept[domain].offer(_number(document.text, settings.seed), document.text)
        else:
            seen[domain] = seen.get(domain, 0) + 1
            left_out += 1
    for domain, share in shares.items():
        share.drawn, share.documents = kept[domain].characters, len(kept[domain])
        if settings.weights and not share.documents:
            found = ", ".join(map(repr, sorted(seen)[:8])) or "none"
            raise UserError(
                f"no document has {settings.domain_field} {domain!r}, which has a weight (others found: {found})"
            )
    return Sample(texts=[text for one in kept.values() for text in one.texts()], shares=shares, left_out=left_out)


def parse_characters(text: str) -> int:
    """The number of characters that `200M` and the like say. Raises UserError when it is none."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    try:
        return round(float(digits) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise UserError(f"--sample {text!r} is no number of characters; write 500K, 200M or 2G") from None


def parse_weights(text: str) -> dict[str, float]:
    """{domain: weight} of `ru=0.7,en=0.3`; empty for the empty text. Raises UserError when it is not of that form."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        domain, equals, number = part.rpartition("=")
        try:
            weight = float(number) if equals else None
        except ValueError:
            weight = None
        if weight is None or not domain.strip() or domain.strip() in found:
            raise UserError(f"--weights {text!r} is not of the form DOMAIN=WEIGHT,DOMAIN=WEIGHT at {part!r}")
        found[domain.strip()] = weight
    return found


_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


class _Smallest:
    """The texts with the smallest numbers that together have at least so many characters."""

    def __init__(self, wanted: int) -> None:
        self.characters = 0
        self._wanted = wanted
        # heapq has its smallest in front, and here the largest is to go.
        self._heap: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, number: int, text: str) -> None:
        if not text or (self.characters >= self._wanted and number >= -self._heap[0][0]):
            return
        heapq.heappush(self._heap, (-number, text))
        self.characters += len(text)
        while self._heap and self.characters - len(self._heap[0][1]) >= self._wanted:
            self.characters -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> list[str]:
        return [text for _, text in sorted(self._heap, reverse=True)]


def _number(text: str, seed: int) -> int:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=(seed % 2**64).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _domain(document: Document, name: str) -> str:
    if name == BY_FILE:
        return PurePath(document.file).name.partition(".")[0]
    return str(document.fields.get(name, ""))
