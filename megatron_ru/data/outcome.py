"""What one task of a step reports: counts, samples of what it dropped, and its files with their sums.

A sum is XXH3 of 128 bits (https://xxhash.com), as `xxh128sum` prints it. It finds files that were torn, flipped or
exchanged, not one that was forged, at 34 GB/s on one core of an AMD EPYC (CRC32 7, SHA-256 2 GB/s).
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from megatron_ru.foundation.files import atomic_output

# Samples kept of one task, and of a step, for each reason.
_SAMPLES_OF_TASK = 3
_SAMPLES_OF_STEP = 12
_SAMPLE_CHARACTERS = 300


@dataclass
class Outcome:
    """Everything in it is the same for any number of workers; how long it took is not part of it."""

    counts: Counter[str] = field(default_factory=Counter)
    """What was seen and what was kept, by name."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents dropped, by reason."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """reason, place, text: the first few of each reason."""
    histograms: dict[str, Counter[str]] = field(default_factory=dict)
    """By name: how many values lie in each class; classes are powers of two."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """name (within the step's folder), bytes, xxh3_128 and what else later steps need to know of them."""

    def drop(self, reason: str, place: str, text: str, count: int = 1) -> None:
        """Counts a document that is dropped and keeps a few as samples."""
        self.dropped[reason] += count
        if self.wants_sample(reason):
            self.samples.append({"reason": reason, "place": place, "text": text[:_SAMPLE_CHARACTERS]})

    def wants_sample(self, reason: str) -> bool:
        """Whether `drop` would keep one more."""
        return sum(sample["reason"] == reason for sample in self.samples) < _SAMPLES_OF_TASK

    def measure(self, name: str, values: npt.NDArray[np.integer[Any]]) -> None:
        """Counts values into classes: class k holds 2^(k-1) <= value < 2^k, class 0 zero."""
        classes = np.bincount(np.frexp(values.astype(np.float64))[1])
        found = self.histograms.setdefault(name, Counter())
        found.update({str(number): int(count) for number, count in enumerate(classes) if count})

    def to_json(self) -> dict[str, Any]:
        histograms = {name: dict(found) for name, found in self.histograms.items()}
        return {
            "counts": dict(self.counts), "dropped": dict(self.dropped), "samples": self.samples,
            "histograms": histograms, "files": self.files,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        return cls(
            Counter(value["counts"]), Counter(value["dropped"]), value["samples"],
            {name: Counter(found) for name, found in value["histograms"].items()}, value["files"],
        )  # fmt: skip

    def add(self, other: "Outcome") -> None:
        """Takes in the outcome of the next task."""
        self.counts.update(other.counts)
        self.dropped.update(other.dropped)
        kept = Counter(sample["reason"] for sample in self.samples)
        for sample in other.samples:
            if kept[sample["reason"]] < _SAMPLES_OF_STEP:
                kept[sample["reason"]] += 1
                self.samples.append(sample)
        for name, found in other.histograms.items():
            self.histograms.setdefault(name, Counter()).update(found)
        self.files += other.files


class HashedStream:
    """A file that is summed while it is written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._sum = xxh3_128()
        self.bytes = 0

    def write(self, data: Any) -> None:
        self._stream.write(data)
        self._sum.update(data)
        self.bytes += memoryview(data).nbytes

    @property
    def xxh3_128(self) -> str:
        return self._sum.hexdigest()


@contextmanager
def hashed_output(folder: Path, name: str, outcome: Outcome, **details: Any) -> Iterator[HashedStream]:
    """Yields a stream for `folder`/`name`; when the block ends well the file is there and in `outcome.files`."""
    with atomic_output(folder / name) as raw:
        stream = HashedStream(raw)
        yield stream
    outcome.files.append({"name": name, "bytes": stream.bytes, "xxh3_128": stream.xxh3_128, **details})


def file_entry(path: Path, **details: Any) -> dict[str, Any]:
    """The entry of a file that somebody else wrote."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, xxh3_128).hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": digest, **details}


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` with sorted keys, whole or not at all."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, ensure_ascii=False, indent=1, sort_keys=True)
        stream.write("\n")
