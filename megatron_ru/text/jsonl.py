"""JSON Lines, one document to a line: `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, and `.parquet`, read as a stream.

A line that is not a document is *malformed*: bad UTF-8, bad JSON, something other than an object, or a text
field that is missing or not a string. By default the first one ends the reading with its `file:line`, because
a stop is better than text lost in silence; with `skip=True` every one is reported as `file:line: reason` and
counted, and the reading goes on. Lines of white space are no documents and no errors.

A file that cannot be read to its end (missing, a folder, a cut-off archive) is always an error: how much was
lost is not known.
"""

import gzip
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import requested_output
from megatron_ru.text.document import Document
from megatron_ru.text.zst import ZstdReader

try:
    from orjson import dumps as _spelled
    from orjson import loads as _loads
except ImportError:

    def _refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON value")

    def _finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else _refuse_constant(number)

    def _loads(line: bytes, /) -> object:  # type: ignore[misc]
        # json would guess UTF-16 and UTF-32, and take NaN, Infinity and 1e400; orjson does none of it.
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)

    def _spelled(text: str) -> bytes:  # type: ignore[misc]
        return json.dumps(text, ensure_ascii=False).encode("utf-8")


class RawLine(NamedTuple):
    """A line as it lies in the file, and where."""

    file: str
    number: int
    """Counted from 1."""
    content: bytes
    position: int
    """Bytes of the file, as stored, that have been read so far: what a progress bar needs."""


class MalformedLine(ValueError):
    """The reason why a line holds no document."""


@dataclass
class MalformedLines:
    """What is done about malformed lines, and how many there were."""

    skip: bool = False
    """Report and go on (True), or end with an error at the first (False)."""

    report: Callable[[str], None] = lambda message: print(message, file=sys.stderr)
    """Gets `file:line: reason` for every line that is left out."""

    count: int = 0

    def add(self, file: str, number: int, reason: str) -> None:
        """Counts and reports one line. Raises UserError unless `skip`."""
        if not self.skip:
            raise UserError(
                f"{file}:{number}: {reason}; mend the line, or pass --skip-malformed to leave such lines out"
            )
        self.count += 1
        self.report(f"{file}:{number}: {reason} (left out)")


def read_documents(
    files: Iterable[str | os.PathLike[str]],
    text_field: str = "text",
    malformed: MalformedLines | None = None,
) -> Iterator[Document]:
    """Yields the documents of `files` in order. Raises UserError as said above; memory holds one line."""
    malformed = MalformedLines() if malformed is None else malformed
    for line in read_lines(files):
        try:
            fields = parse_object(line.content, text_field)
        except MalformedLine as error:
            malformed.add(line.file, line.number, str(error))
            continue
        text = str(fields.pop(text_field))
        yield Document(text=text, file=line.file, line=line.number, fields=fields)


def write_documents(path: str | os.PathLike[str], documents: Iterable[Document]) -> int:
    """Writes `documents` to `path` as JSON Lines (`.gz` compresses) and returns how many there were.

    The file appears when it is complete. The same documents give the same bytes. Raises UserError when it
    cannot be written.
    """
    count = 0
    with requested_output(path) as raw:
        # A fixed time stamp and no name inside the archive: equal documents are equal bytes.
        zipped = gzip.GzipFile("", "wb", 6, raw, mtime=0) if str(path).endswith(".gz") else None
        stream = raw if zipped is None else zipped
        for document in documents:
            record = {"text": document.text, **document.fields}
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
        if zipped is not None:
            zipped.close()
    return count


def read_lines(files: Iterable[str | os.PathLike[str]], only_field: str | None = None) -> Iterator[RawLine]:
    """Yields the lines of `files` that are not blank, undecoded; of a `.parquet` its rows, written as JSON.

    With `only_field` nothing else is read from a parquet file. Raises UserError for a file that cannot be read to its
    end.
    """
    for path in map(Path, files):
        name = str(path)
        require_readable_file(path)
        if path.suffix == ".parquet":
            yield from _parquet_lines(name, only_field)
            continue
        try:
            with path.open("rb") as stored, _decompressed(path, stored) as stream:
                for number, content in enumerate(stream, start=1):
                    if number == 1:
                        content = content.removeprefix(b"\xef\xbb\xbf")
                    if not content.isspace():
                        yield RawLine(name, number, content, stored.tell())
        except EOFError:
            raise UserError(f"{name} is cut off: the compressed data ends before its end mark; get it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name} is not sound gzip ({error}); get it again, or rename it if it is no .gz") from None
        except OSError as error:
            raise UserError(f"cannot read {name}: {error.strerror or error}") from None


def _parquet_lines(name: str, only_field: str | None) -> Iterator[RawLine]:
    from megatron_ru.text.parquet import read_rows

    for number, content, position in read_rows(name, only_field):
        yield RawLine(name, number, content, position)


def text_of(line: bytes, text_field: str = "text") -> str:
    """The text of a line that is known, or hoped, to be a document; where there is none, something that is no string or
    an exception of any kind. `parse_object` says why."""
    found: str = _loads(line)[text_field]
    return found


def spelling(text: str) -> bytes:
    """`text` as JSON in UTF-8, without its quotes, in the one way that escapes no more than it must.

    Different texts have different spellings. Raises an exception for half of a surrogate pair.
    """
    return _spelled(text)[1:-1]


def require_readable_file(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless `path` is a file that can be opened."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a file of JSON lines; name the files in it, such as {path}/*.jsonl")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def parse_object(line: bytes, text_field: str = "text") -> dict[str, object]:
    """The JSON object of `line`, whose `text_field` is a string that UTF-8 can hold. Raises MalformedLine."""
    try:
        value = _loads(line)
    except UnicodeDecodeError as error:
        raise MalformedLine(_bad_byte(error)) from None
    except (ValueError, RecursionError) as error:
        raise MalformedLine(_why_not_json(line, error)) from None
    if not isinstance(value, dict):
        raise MalformedLine(f"expected a JSON object, found {_JSON_NAMES.get(type(value), type(value).__name__)}")
    if text_field not in value:
        # A long record has many fields; a few are enough to see the mistake.
        known = ", ".join(repr(key) for key in list(value)[:8]) or "none"
        raise MalformedLine(f"no field {text_field!r} (its fields: {known})")
    text = value[text_field]
    if not isinstance(text, str):
        found = _JSON_NAMES.get(type(text), type(text).__name__)
        raise MalformedLine(f"field {text_field!r} should be a string, found {found}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedLine(f"half of a surrogate pair in field {text_field!r} at character {error.start}") from None
    return value


_COMPRESSED = {".gz", ".zst", ".zstd"}

_JSON_NAMES = {
    dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null",
    int: "a number", float: "a number",
}  # fmt: skip


def _why_not_json(line: bytes, error: Exception) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad_byte:
        return _bad_byte(bad_byte)
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return f"not JSON: {error}"


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}"


def _decompressed(path: Path, stored: IO[bytes]) -> IO[bytes]:
    if path.suffix in _COMPRESSED and path.stat().st_size == 0:
        # The libraries take this for an archive of nothing; it is a copy that failed at its first byte.
        raise EOFError
    match path.suffix:
        case ".gz":
            return gzip.open(stored, "rb")  # type: ignore[return-value]
        case ".zst" | ".zstd":
            return ZstdReader.open(path, stored)
        case _:
            return stored
