"""Reads every input once: which lines are documents, and what their texts' digests and lengths are."""

import hashlib
from array import array
from typing import Any

import numpy as np

from megatron_ru.data.json_lines import text_of
from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import BLANK, LINES, NO_DOCUMENT, sorted_digests
from megatron_ru.data.sources import Source
from megatron_ru.data.step import STEPS, Step
from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import MalformedLine, parse_object

_SEGMENT_LINES = 1 << 20


def _run(run: Run, task: int) -> Outcome:
    config = run.config
    source = run.sources[task]
    outcome = Outcome()
    field, skip = config.text_field, config.malformed == "skip"
    limit = config.shard_bytes
    segment = _Segment(0)
    md5 = hashlib.md5
    for number, content in source.lines():
        # In a compressed file blank lines are left out on the way.
        while segment.first_line + len(segment.sizes) < number:
            segment.add_line(0, BLANK)
        try:
            text = text_of(content, field)
            encoded = text.encode()
        except Exception:
            encoded = None
        if encoded is None:
            if content.isspace():
                segment.add_line(len(content), BLANK)
            else:
                _malformed(outcome, source, number, content, field, skip)
                segment.add_line(len(content), NO_DOCUMENT)
        else:
            segment.digests += md5(encoded).digest()
            segment.lines.append(len(segment.sizes))
            segment.add_line(len(content), len(text))
            # In the bytes: a search for zero in wide characters is no memchr.
            if b"\0" in encoded:
                outcome.counts["documents_with_nul"] += 1
        if segment.bytes >= limit or len(segment.sizes) >= _SEGMENT_LINES:
            segment.write(run, task, outcome)
            segment = _Segment(number + 1)
    if segment.sizes or not outcome.files:
        segment.write(run, task, outcome)
    return outcome


class _Segment:
    """The records of a segment while it is read."""

    def __init__(self, first_line: int) -> None:
        self.first_line = first_line
        self.digests = bytearray()
        self.lines = array("I")
        self.sizes = array("I")
        self.characters = array("i")
        self.bytes = 0

    def add_line(self, size: int, characters: int) -> None:
        self.sizes.append(size)
        self.characters.append(characters)
        self.bytes += size

    def write(self, run: Run, task: int, outcome: Outcome) -> None:
        name = f"{task:06d}-{sum(entry['kind'] == 'lines' for entry in outcome.files):04d}"
        folder = run.step_folder("read")
        records = np.empty(len(self.sizes), dtype=LINES)
        records["bytes"] = self.sizes
        records["characters"] = self.characters
        characters = records["characters"][records["characters"] >= 0]
        details = {"task": task, "documents": len(self.lines), "first_line": self.first_line, "text_bytes": self.bytes}
        digests = sorted_digests(self.digests, np.array(self.lines, dtype=np.uint32))
        with hashed_output(folder, f"{name}.digests", outcome, kind="digests", **details) as stream:
            stream.write(digests.tobytes())
        with hashed_output(folder, f"{name}.lines", outcome, kind="lines", **details) as stream:
            stream.write(records.tobytes())
        outcome.counts["lines"] += len(records)
        outcome.counts["blank_lines"] += int((records["characters"] == BLANK).sum())
        outcome.counts["documents"] += len(self.lines)
        outcome.counts["bytes"] += self.bytes
        outcome.counts["characters"] += int(characters.sum(dtype=np.int64))


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
        version=1,
        wanted=lambda config: True,
        settings=_settings,
        tasks=lambda run: len(run.sources),
        run=_run,
    )
)
