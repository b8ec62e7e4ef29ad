"""Reads every input once: which lines are documents, and what their texts' digests and lengths are."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import BLANK, LINES, NO_DOCUMENT, sorted_digests
from megatron_ru.data.sources import Source
from megatron_ru.data.step import STEPS, Step
from megatron_ru.foundation.errors import UserError
from megatron_ru.text.json_blocks import BlockReader
from megatron_ru.text.jsonl import MalformedLine, parse_object, spelling, text_of

_SEGMENT_LINES = 1 << 20

# Of a compressed file, where lines come one by one.
_LINES_AT_ONCE = 1024


class _Lines(NamedTuple):
    """Successive lines of a source."""

    sizes: npt.NDArray[np.integer[Any]]
    characters: npt.NDArray[np.integer[Any]]
    """Of the text, or NO_DOCUMENT or BLANK."""
    digests: bytes
    """Of those that are documents."""


def _run(run: Run, task: int) -> Outcome:
    source = run.sources[task]
    outcome = Outcome()
    segment = _Segment(0)
    judge = _Judge(run, source, outcome)
    for lines in _blocks(source, judge) if source.plain else _batches(source, judge):
        while (taken := segment.room(lines, run.config.shard_bytes)) is not None:
            first, lines = _split(lines, taken)
            segment.add(first)
            segment.write(run, task, outcome)
            segment = _Segment(segment.first_line + segment.lines)
        segment.add(lines)
    if segment.lines or not outcome.files:
        segment.write(run, task, outcome)
    source.require_unchanged()
    return outcome


def _blocks(source: Source, judge: "_Judge") -> Iterator[_Lines]:
    """The lines of a plain file."""
    reader = BlockReader(judge.field)
    number = 0
    for block in source.blocks():
        ends, spellings, characters = reader.read(block)
        begin = 0
        if None in spellings:
            for line, end in enumerate(ends.tolist()):
                if spellings[line] is None:
                    spellings[line], characters[line] = judge.look(number + line, block[begin:end])
                begin = end
        number += len(ends)
        yield _Lines(np.diff(ends, prepend=0), characters, _digests(spellings))


def _batches(source: Source, judge: "_Judge") -> Iterator[_Lines]:
    """The lines of any other file."""
    batch = _Batch()
    for number, content in source.lines():
        batch.add(len(content), *judge.look(number, content))
        if len(batch.sizes) >= _LINES_AT_ONCE:
            yield batch.lines()
            batch = _Batch()
    yield batch.lines()


class _Batch:
    """Lines that are gathered one by one."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._characters: list[int] = []
        self._digests = bytearray()

    def add(self, size: int, spelled: bytes | None, characters: int) -> None:
        self.sizes.append(size)
        self._characters.append(characters)
        self._digests += _digests([spelled])

    def lines(self) -> _Lines:
        return _Lines(np.array(self.sizes, np.int64), np.array(self._characters, np.int64), bytes(self._digests))


def _digests(spellings: list[bytes | None]) -> bytes:
    md5 = hashlib.md5
    return b"".join([md5(found, usedforsecurity=False).digest() for found in spellings if found is not None])


class _Judge:
    """Looks at lines one by one."""

    def __init__(self, run: Run, source: Source, outcome: Outcome) -> None:
        self.field = run.config.text_field
        self._source, self._outcome = source, outcome
        self._skip = run.config.malformed == "skip"

    def look(self, number: int, content: bytes) -> tuple[bytes | None, int]:
        """(the spelling of the text, its characters) of a document, (None, BLANK or NO_DOCUMENT) of another line.

        Counts the latter. Raises UserError for a malformed line that is not to be skipped.
        """
        try:
            text = text_of(content, self.field)
            spelled = spelling(text) if isinstance(text, str) else None
        except Exception:
            spelled = None
        if spelled is None:
            if content.isspace() or not content:
                return None, BLANK
            _malformed(self._outcome, self._source, number, content, self.field, self._skip)
            return None, NO_DOCUMENT
        self._outcome.counts["documents_with_nul"] += b"\\u0000" in spelled and "\0" in text
        return spelled, len(text)


def _split(lines: _Lines, first: int) -> tuple[_Lines, _Lines]:
    documents = int((lines.characters[:first] >= 0).sum()) * 16
    return (
        _Lines(lines.sizes[:first], lines.characters[:first], lines.digests[:documents]),
        _Lines(lines.sizes[first:], lines.characters[first:], lines.digests[documents:]),
    )


class _Segment:
    """The records of a segment while it is read."""

    def __init__(self, first_line: int) -> None:
        self.first_line = first_line
        self.lines = 0
        self._bytes = 0
        self._parts: list[_Lines] = []

    def room(self, lines: _Lines, limit: int) -> int | None:
        """How many of `lines` fill the segment; None when they do not."""
        filled = int(np.searchsorted(np.cumsum(lines.sizes), limit - self._bytes)) + 1
        taken = min(filled, _SEGMENT_LINES - self.lines)
        return taken if taken <= len(lines.sizes) else None

    def add(self, lines: _Lines) -> None:
        self._parts.append(lines)
        self.lines += len(lines.sizes)
        self._bytes += int(lines.sizes.sum())

    def write(self, run: Run, task: int, outcome: Outcome) -> None:
        name = f"{task:06d}-{sum(entry['kind'] == 'lines' for entry in outcome.files):04d}"
        folder = run.step_folder("read")
        records = np.empty(self.lines, dtype=LINES)
        if self._parts:
            records["bytes"] = np.concatenate([part.sizes for part in self._parts])
            records["characters"] = np.concatenate([part.characters for part in self._parts])
        documents = np.flatnonzero(records["characters"] >= 0).astype(np.uint32)
        details = {"task": task, "documents": len(documents), "first_line": self.first_line, "text_bytes": self._bytes}
        digests = sorted_digests(b"".join(part.digests for part in self._parts), documents)
        with hashed_output(folder, f"{name}.digests", outcome, kind="digests", **details) as stream:
            stream.write(digests.tobytes())
        with hashed_output(folder, f"{name}.lines", outcome, kind="lines", **details) as stream:
            stream.write(records.tobytes())
        outcome.counts["lines"] += len(records)
        outcome.counts["blank_lines"] += int((records["characters"] == BLANK).sum())
        outcome.counts["documents"] += len(documents)
        outcome.counts["bytes"] += self._bytes
        outcome.counts["characters"] += int(records["characters"][documents].sum(dtype=np.int64))


def _malformed(outcome: Outcome, source: Source, number: int, content: bytes, field: str, skip: bool) -> None:
    try:
        parse_object(content, field)
    except MalformedLine as error:
        # Where it lies is looked up in the file, so only for those that are shown.
        shown = not skip or outcome.wants_sample("malformed")
        place = source.place(number) if shown else ""
        if not skip:
            raise UserError(
                f"{place}: {error}; mend the line, or set malformed: skip to leave such lines out and count them"
            ) from None
        outcome.drop("malformed", place, f"{error} | {content[:200].decode('utf-8', 'replace')}")
        return
    raise AssertionError(f"{source.place(number)} is a document after all")


def _settings(config: Any) -> Any:
    return {"text_field": config.text_field, "malformed": config.malformed, "shard": config.shard_bytes}


STEPS.register("read")(
    Step(
        place=10,
        version=2,
        wanted=lambda config: True,
        settings=_settings,
        tasks=lambda run: len(run.sources),
        run=_run,
    )
)
