"""Shards of the documents that are kept: neither a duplicate, nor too short, nor in another language.

Lines are copied as they lie in the input. A plain file without a language filter is copied in stretches of bytes,
without a look at what is in them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ru.data.language import language_detector
from megatron_ru.data.outcome import HashedStream, Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import DUPLICATES, LINES, open_records
from megatron_ru.data.sources import Source
from megatron_ru.data.step import STEPS, Step
from megatron_ru.text.jsonl import text_of

_COPY_BYTES = 1 << 19


def _run(run: Run, task: int) -> Outcome:
    source = run.sources[task]
    source.require_unchanged()
    outcome = Outcome()
    segments = [(number, entry) for number, entry in enumerate(_places(run).segments) if entry["task"] == task]
    judge = _judge(run, source)
    lines = None if source.plain and judge is None else source.lines()
    byte = source.first_byte() if lines is None else 0
    for number, entry in segments:
        records = np.array(open_records(entry["path"], LINES))
        keep = _kept(run, task, number, entry["first_line"], records, outcome)
        # Nothing is written of a segment that lost all its documents.
        name, shard = f"{entry['name'].removesuffix('.lines')}.jsonl", Outcome()
        with hashed_output(run.step_folder("texts"), name, shard, kind="shard", domain=source.domain) as stream:
            if lines is None:
                _copy_bytes(source, byte, records, keep, stream)
            else:
                _copy_lines(run, task, lines, entry["first_line"], keep, stream, outcome, judge)
            byte += int(records["bytes"].sum(dtype=np.int64))
        kept = int(keep.sum())
        shard.files[0]["documents"] = kept
        outcome.counts["documents"] += kept
        outcome.counts["bytes"] += shard.files[0]["bytes"]
        outcome.counts["characters"] += int(records["characters"][keep].sum(dtype=np.int64))
        outcome.measure("characters", records["characters"][keep])
        if kept:
            outcome.files += shard.files
        else:
            (run.step_folder("texts") / name).unlink()
    source.require_unchanged()
    return outcome


def _kept(
    run: Run, task: int, segment: int, first_line: int, records: npt.NDArray[Any], outcome: Outcome
) -> npt.NDArray[np.bool_]:
    """Which lines are kept, as far as lengths and duplicates say, bool [lines]; the others are counted."""
    keep = records["characters"] >= 0
    if run.config.exact_dedup:
        found = _duplicates_of(run, segment)
        keep[found["line"]] = False
        outcome.dropped["duplicate"] += len(found)
        for record in found[:3]:
            if outcome.wants_sample("duplicate"):
                outcome.drop("duplicate", _place(run, task, first_line + int(record["line"])), _twin(run, record), 0)
    if run.config.length is not None:
        short = keep & (records["characters"] < run.config.length.at_least)
        outcome.dropped["too_short"] += int(short.sum())
        for line in np.flatnonzero(short)[:3]:
            if outcome.wants_sample("too_short"):
                place = _place(run, task, first_line + int(line))
                outcome.drop("too_short", place, f"{records['characters'][line]} characters", 0)
        keep &= ~short
    return keep


def _duplicates_of(run: Run, segment: int) -> npt.NDArray[Any]:
    parts = []
    for entry in run.files("exact_dedup", kind="duplicates"):
        records = open_records(entry["path"], DUPLICATES)
        first, last = np.searchsorted(records["segment"], [segment, segment + 1])
        parts.append(np.array(records[first:last]))
    found = np.concatenate(parts)
    return found[np.argsort(found["line"], kind="stable")]


def _twin(run: Run, record: Any) -> str:
    entry = _places(run).segments[int(record["kept_segment"])]
    return f"same text as {_place(run, entry['task'], entry['first_line'] + int(record['kept_line']))}"


def _place(run: Run, task: int, line: int) -> str:
    """`file:line` of a line of a source. `Source.place` would read the file up to it; here all lines are counted."""
    return f"{run.sources[task].file}:{_places(run).lines_before[task] + line + 1}"


class _Places(NamedTuple):
    """Where the segments of a run lie in the files."""

    segments: list[dict[str, Any]]
    """The files of lines, in order."""
    lines_before: list[int]
    """Of each source: lines of its file before its first."""


@lru_cache(maxsize=1)
def _places(run: Run) -> _Places:
    # Once for a task: with ten thousand sources it takes as long as the copying of a shard.
    segments = run.files("read", kind="lines")
    lines = Counter[int]()
    for entry in segments:
        lines[entry["task"]] += entry["bytes"] // LINES.itemsize
    before, seen = [], Counter[str]()
    for task, source in enumerate(run.sources):
        before.append(seen[source.file])
        seen[source.file] += lines[task]
    return _Places(segments, before)


_Judge = Callable[[str], str | None]


def _judge(run: Run, source: Source) -> _Judge | None:
    """A function from a text to the language that it is dropped for, or None."""
    wanted = run.config.language
    if wanted is None or source.any_language:
        return None
    detect = language_detector(wanted.characters)
    keep, threshold = set(wanted.keep), wanted.threshold

    def judge(text: str) -> str | None:
        found = detect(text)
        if not found:
            return "none"
        if found[0][0] in keep:
            return None if sum(score for language, score in found if language in keep) >= threshold else "unsure"
        return found[0][0]

    return judge


def _copy_lines(
    run: Run,
    task: int,
    lines: Iterator[tuple[int, bytes]],
    first_line: int,
    keep: npt.NDArray[np.bool_],
    stream: HashedStream,
    outcome: Outcome,
    judge: _Judge | None,
) -> None:
    """Writes the kept lines of a segment; `keep` loses those in another language."""
    last = first_line + len(keep) - 1
    for number, content in lines:
        index = number - first_line
        if keep[index]:
            if judge is not None:
                text = text_of(content, run.config.text_field)
                language = judge(text)
                if language is not None:
                    keep[index] = False
                    outcome.counts[f"language_{language}"] += 1
                    place = _place(run, task, number) if outcome.wants_sample("language") else ""
                    outcome.drop("language", place, f"{language} | {text[:200]}")
            if keep[index]:
                stream.write(content if content.endswith(b"\n") else content + b"\n")
        if number >= last:
            return


def _copy_bytes(
    source: Source, start: int, records: npt.NDArray[Any], keep: npt.NDArray[np.bool_], stream: HashedStream
) -> None:
    """Writes the kept lines of a segment that begins at byte `start` of a plain file."""
    ends = np.cumsum(records["bytes"], dtype=np.int64)
    edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    # Stretches of kept lines, in bytes of the segment.
    stretches = np.stack([ends[edges[:, 0]] - records["bytes"][edges[:, 0]], ends[edges[:, 1] - 1]], axis=1)
    size = int(ends[-1]) if len(ends) else 0
    last = b"\n"
    with open(source.file, "rb", buffering=0) as file:
        file.seek(start)
        for low in range(0, size, _COPY_BYTES):
            piece = memoryview(_read_whole(file, min(_COPY_BYTES, size - low)))
            first = np.searchsorted(stretches[:, 1], low, "right")
            behind = np.searchsorted(stretches[:, 0], low + len(piece))
            here = np.clip(stretches[first:behind] - low, 0, len(piece)).tolist()
            if here:
                kept = b"".join([piece[begin:end] for begin, end in here])
                stream.write(kept)
                last = kept
    if not last.endswith(b"\n"):
        stream.write(b"\n")


def _read_whole(file: Any, size: int) -> bytes:
    parts = []
    while size:
        part = file.read(size)
        if not part:
            raise OSError(f"{file.name} became shorter while it was read")
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _settings(config: Any) -> Any:
    found = {"length": config.length, "language": config.language}
    unfiltered = [entry.domain for entry in config.inputs if entry.any_language]
    return found | {"any_language": unfiltered} if unfiltered and config.language else found


STEPS.register("texts")(
    Step(
        place=30,
        version=1,
        wanted=lambda config: True,
        settings=_settings,
        tasks=lambda run: len(run.sources),
        run=_run,
    )
)
