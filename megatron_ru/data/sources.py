"""The input files, in pieces that tasks work on: a plain file in byte ranges, a compressed one whole."""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ru.data.config import PipelineConfig
from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import read_lines, require_readable_file

_BOM = b"\xef\xbb\xbf"
# Small enough for the second cache of a processor, with what is made of it.
_BLOCK = 1 << 19
_FINGERPRINT_PIECES = 64
_FINGERPRINT_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """One task of reading."""

    domain: str
    file: str
    start: int
    """The lines that begin in bytes [start, end) of the file."""
    end: int
    plain: bool
    """Whether lines lie in the file as they are: byte ranges can be copied."""
    any_language: bool
    changed_ns: int = 0
    """When the file was changed last, as it was when the run began; 0 where nobody looked."""

    def require_unchanged(self) -> None:
        """Raises UserError when the file was changed since the run began: its lines were counted then."""
        try:
            found = os.stat(self.file).st_mtime_ns
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from None
        if self.changed_ns not in (0, found):
            raise UserError(f"{self.file} was changed while it was read; run the same command when nobody writes to it")

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields (number within the source from 0, content) of each line; blank ones of a compressed file are empty, or
        left out at its end. Raises UserError for a file that cannot be read to its end."""
        if not self.plain:
            following = 0
            for line in read_lines([self.file]):
                yield from ((number, b"") for number in range(following, line.number - 1))
                yield line.number - 1, line.content
                following = line.number
            return
        try:
            with open(self.file, "rb", buffering=1 << 20) as stream:
                position = self._first_line(stream)
                # From here line by line: this loop is the inner loop of the pipeline.
                for number, content in enumerate(stream):
                    if position >= self.end:
                        return
                    position += len(content)
                    if number == 0 and self.start == 0 and content.startswith(_BOM):
                        content = content[3:]
                    yield number, content
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from None

    def blocks(self) -> Iterator[bytes]:
        """The lines of a plain source in blocks of whole lines, of half a megabyte or one line.

        Raises UserError for a file that cannot be read.
        """
        try:
            position = self.first_byte()
            # The first line begins before its mark of byte order.
            end = max(self.end, position + 1) if self.start == 0 < self.end else self.end
            with open(self.file, "rb", buffering=0) as stream:
                while position < end:
                    block = _whole_lines(stream.fileno(), position, end)
                    if not block:
                        return
                    yield block
                    position += len(block)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from None

    def first_byte(self) -> int:
        """Where the first line of a plain source begins."""
        with open(self.file, "rb") as stream:
            position = self._first_line(stream)
            stream.seek(position)
            return position + 3 if position == 0 and stream.read(3) == _BOM else position

    def place(self, line: int) -> str:
        """`file:line` of a line of this source; reads the file up to it."""
        before = 0
        if self.plain and self.start:
            with open(self.file, "rb") as stream:
                left = self.first_byte()
                while left and (chunk := stream.read(min(left, 1 << 22))):
                    before += chunk.count(b"\n")
                    left -= len(chunk)
        return f"{self.file}:{before + line + 1}"

    def _first_line(self, stream: Any) -> int:
        """Moves the stream to the first line that begins at or behind `start` and returns its position."""
        if self.start == 0:
            return 0
        stream.seek(self.start - 1)
        stream.readline()
        return int(stream.tell())


def _whole_lines(file: int, position: int, end: int) -> bytes:
    """The next lines of those that begin before `end`; empty at the end of the file."""
    size = _BLOCK
    block = os.pread(file, size, position)
    while block:
        # A line that begins before the end of the source is read beyond it.
        last = block.find(b"\n", max(0, end - 1 - position))
        if last < 0:
            last = block.rfind(b"\n")
        if last >= 0:
            return block[: last + 1]
        size *= 2
        more = os.pread(file, size, position + len(block))
        if not more:
            return block
        block += more
    return block


def find_sources(config: PipelineConfig) -> tuple[list[Source], list[dict[str, Any]]]:
    """(the sources in order, a record of each input file: domain, file, bytes, fingerprint).

    Raises UserError for a pattern that matches nothing and a file that cannot be read.
    """
    size = config.shard_bytes
    sources, inputs = [], []
    for entry in config.inputs:
        files = [file for pattern in entry.files for file in _matches(pattern, entry.domain, config.output)]
        for file in files:
            _require_rereadable(file)
            length = os.path.getsize(file)
            plain = file.endswith((".jsonl", ".json", ".ndjson"))
            inputs.append({"domain": entry.domain, "file": file, "bytes": length, "fingerprint": fingerprint(file)})
            # An empty .jsonl is one task with nothing in it, so that it is named in the report.
            pieces = max(1, -(-length // size)) if plain else 1
            step = -(-length // pieces)
            for piece in range(pieces):
                sources.append(
                    Source(
                        domain=entry.domain, file=file, start=piece * step, end=min((piece + 1) * step, length),
                        plain=plain, any_language=entry.any_language, changed_ns=os.stat(file).st_mtime_ns,
                    )
                )  # fmt: skip
    seen: dict[str, str] = {}
    for file in (str(entry["file"]) for entry in inputs):
        # Also by another path, or through a link.
        real = os.path.realpath(file)
        if real in seen:
            also = "" if seen[real] == file else f", also as {seen[real]}"
            raise UserError(f"{file} is named twice in the inputs{also}; name each file once")
        seen[real] = file
    return sources, inputs


def fingerprint(file: str) -> str:
    """A hash of the file's size, time of change and 64 pieces of 64 KiB spread over it.

    Whole files up to 4 MiB; of a larger one not every byte, since terabytes are not read to learn that they are known.
    """
    state = os.stat(file)
    found = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode())
    with open(file, "rb") as stream:
        for piece in range(_FINGERPRINT_PIECES):
            stream.seek(max(0, (state.st_size - _FINGERPRINT_BYTES) * piece // (_FINGERPRINT_PIECES - 1)))
            found.update(stream.read(_FINGERPRINT_BYTES))
    return found.hexdigest()


def _matches(pattern: str, domain: str, output: str) -> list[str]:
    """The files of a pattern, in order, without what the pipeline itself has made."""
    # A file may be called a[1].jsonl.
    if not glob.has_magic(pattern) or os.path.lexists(pattern):
        return [pattern]
    own = os.path.join(os.path.abspath(output), "steps", "")
    found = sorted(file for file in glob.glob(pattern, recursive=True) if not os.path.abspath(file).startswith(own))
    if not found:
        raise UserError(f"no file matches {pattern} (domain {domain})")
    return found


def _require_rereadable(file: str) -> None:
    """Raises UserError unless the file can be read as often as the steps do, and its name be written down."""
    # Opening a pipe that nobody writes to would wait for ever.
    if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        raise UserError(
            f"{file} is no file but a pipe or a device, and is read more than once; write it to a file first"
        )
    require_readable_file(file)
    try:
        file.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of the file {file!r} is not UTF-8; rename it") from None
