"""JSON Lines in, Megatron's .bin and .idx out, with as many processes as one likes.

The main process reads and decompresses lines, workers parse and encode them in batches, and the main process
writes the results in the order of the input: the files are the same, byte for byte, for any number of
workers. At most two batches per worker and two more are under way, so memory stays flat.

They are also the files that Megatron-LM's tools/preprocess_data.py writes with --append-eod (a document
without tokens gets no end token there and here), but for two things: a control token of a Hugging Face
tokenizer that is spelled out in a text is text here; and for a sentencepiece model that folds runs of spaces,
which none trained by us does, Megatron marks the spaces and splits the text at them, and we do not.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import (
    MalformedLine,
    MalformedLines,
    RawLine,
    parse_object,
    read_lines,
    require_readable_file,
)
from megatron_ru.tokenizer.loading import Tokenizer, load_tokenizer
from megatron_ru.tokens.indexed_dataset import token_dtype, write_dataset

# Large enough that the way to a worker costs nothing, small enough that two hundred workers fit in memory.
_BATCH_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TokeniseSettings:
    """What decides the tokens, and how many processes make them."""

    text_field: str = "text"
    """The field of the JSON object that holds the text."""

    append_eod: bool = True
    """End every document that has tokens with the tokenizer's end-of-document token."""

    workers: int = 1
    """Processes that encode; with 1 the main process does it."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"the number of workers is {self.workers}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TokeniseSummary:
    """What was written."""

    documents: int
    """Those without tokens included."""
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """Of the lines read, decompressed."""
    malformed: int
    """Lines left out."""
    dtype: str
    seconds: float


def tokenise(
    files: Sequence[str | os.PathLike[str]],
    tokenizer_path: str | os.PathLike[str],
    prefix: str | os.PathLike[str],
    settings: TokeniseSettings,
    *,
    malformed: MalformedLines | None = None,
    progress: Callable[[int], object] | None = None,
) -> TokeniseSummary:
    """Writes the documents of `files`, in order, to `prefix`.bin and .idx and returns their counts.

    `progress` is called with the number of bytes of the files, as stored, that have been dealt with since
    the last call. Raises UserError, and leaves no file, when an input cannot be read, a line is malformed
    and not to be skipped, no document has a token, the disk is full, or a worker dies.
    """
    started = time.monotonic()
    malformed = MalformedLines() if malformed is None else malformed
    for file in files:
        require_readable_file(file)
    tokenizer = load_tokenizer(tokenizer_path)
    if settings.append_eod and tokenizer.eod is None:
        raise UserError(
            f"the tokenizer {tokenizer_path} has no end-of-sequence token to end documents with; "
            "pass --no-append-eod, or a tokenizer that has one"
        )
    text_bytes = 0
    with (
        write_dataset(prefix, tokenizer.vocab_size) as writer,
        _encoder(tokenizer, settings) as encode,
    ):
        for batch, encoded in encode(_batches(read_lines(files))):
            for file, number, reason in encoded.malformed:
                malformed.add(file, number, reason)
            writer.add_documents(encoded.ids, encoded.lengths)
            text_bytes += batch.text_bytes
            if progress is not None:
                progress(batch.stored_bytes)
        if writer.tokens == 0:
            names = ", ".join(map(str, files))
            raise UserError(f"no document with a token in {names}; a dataset must not be empty")
    return TokeniseSummary(
        documents=writer.documents, tokens=writer.tokens, text_bytes=text_bytes, malformed=malformed.count,
        dtype=str(writer.dtype), seconds=time.monotonic() - started,
    )  # fmt: skip


@dataclass
class _Batch:
    """Lines for one worker."""

    lines: list[RawLine] = field(default_factory=list)
    text_bytes: int = 0
    stored_bytes: int = 0


@dataclass
class _Encoded:
    """A batch's documents, as ids one after the other and lengths, and the lines that were none."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    malformed: list[tuple[str, int, str]]


def _batches(lines: Iterable[RawLine]) -> Iterator[_Batch]:
    batch = _Batch()
    file, position = "", 0
    for line in lines:
        if line.file != file:
            file, position = line.file, 0
        batch.lines.append(line)
        batch.text_bytes += len(line.content)
        batch.stored_bytes += line.position - position
        position = line.position
        if batch.text_bytes >= _BATCH_BYTES:
            yield batch
            batch = _Batch()
    if batch.lines:
        yield batch


_Encode = Callable[[Iterable[_Batch]], Iterator[tuple[_Batch, _Encoded]]]


def _encoder(tokenizer: Tokenizer, settings: TokeniseSettings) -> AbstractContextManager[_Encode]:
    """A context that gives a function from batches to batches with their encodings, in the same order."""
    if settings.workers > 1:
        return _WorkerPool(tokenizer, settings)
    return nullcontext(lambda batches: ((batch, _encode(tokenizer, settings, batch)) for batch in batches))


def _encode(tokenizer: Tokenizer, settings: TokeniseSettings, batch: _Batch) -> _Encoded:
    texts: list[str] = []
    places: list[RawLine] = []
    malformed: list[tuple[str, int, str]] = []
    for line in batch.lines:
        try:
            texts.append(str(parse_object(line.content, settings.text_field)[settings.text_field]))
            places.append(line)
        except MalformedLine as error:
            malformed.append((line.file, line.number, str(error)))
    documents = _encode_texts(tokenizer, texts, places)
    if settings.append_eod:
        assert tokenizer.eod is not None
        for document in documents:
            if document:
                document.append(tokenizer.eod)
    lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
    ids = np.fromiter(chain.from_iterable(documents), dtype=token_dtype(tokenizer.vocab_size), count=int(lengths.sum()))
    return _Encoded(ids, lengths, malformed)


def _encode_texts(tokenizer: Tokenizer, texts: list[str], places: list[RawLine]) -> list[list[int]]:
    """The ids of each text. Raises UserError, which names the line, when the tokenizer fails on one."""
    try:
        return tokenizer.encode_batch(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as failure:  # a panic in Rust is a BaseException
        for text, place in zip(texts, places, strict=True):
            try:
                tokenizer.encode(text)
            except BaseException as error:
                raise UserError(
                    f"{place.file}:{place.number}: the tokenizer {tokenizer.path} fails on this document of "
                    f"{len(text)} characters: {error!r}"
                ) from None
        raise UserError(f"the tokenizer {tokenizer.path} failed: {failure!r}") from None


class _WorkerPool:
    """Processes that encode. A pool that loses one of them fails at once, it does not wait."""

    def __init__(self, tokenizer: Tokenizer, settings: TokeniseSettings) -> None:
        self._settings = settings
        # Spawned, not forked: the caller may have threads, and a copy of their locks would hang.
        self._executor = ProcessPoolExecutor(
            settings.workers, get_context("spawn"), _start_worker, (tokenizer.path, settings)
        )

    def __enter__(self) -> _Encode:
        return self._run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, _Encoded]]:
        under_way: deque[tuple[_Batch, Future[_Encoded]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, self._executor.submit(_encode_in_worker, batch)))
                if len(under_way) > 2 * self._settings.workers + 1:
                    first, encoded = under_way.popleft()
                    yield first, encoded.result()
            while under_way:
                first, encoded = under_way.popleft()
                yield first, encoded.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died before its work was done (killed, or out of memory); nothing was "
                f"kept: run it again, with fewer --workers than {self._settings.workers} if memory was short"
            ) from None


_worker: tuple[Tokenizer, TokeniseSettings] | None = None


def _start_worker(tokenizer_path: str, settings: TokeniseSettings) -> None:
    """Loads the tokenizer once for each worker, and ends the worker when its parent is gone."""
    global _worker
    # Ctrl-C reaches the whole group; the parent cleans up, and two dozen tracebacks would hide why.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _worker = load_tokenizer(tokenizer_path), settings


def _end_with(sentinel: int) -> None:
    # A worker whose parent was killed would wait for work for ever: it holds both ends of its own queue.
    connection.wait([sentinel])
    os._exit(1)


def _encode_in_worker(batch: _Batch) -> _Encoded:
    assert _worker is not None
    return _encode(*_worker, batch)
