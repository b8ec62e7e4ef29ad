"""JSON Lines in, Megatron's .bin and .idx out, with as many processes as one likes.

The main process reads and decompresses lines, workers parse and encode them in batches, and the main process
writes the results in the order of the input: the files are the same, byte for byte, for any number of
workers. At most two batches per worker and two more are under way, so memory stays flat.

They are also the files that Megatron-LM's tools/preprocess_data.py writes with --append-eod (a document
without tokens gets no end token there and here), but for two things: a control token of a Hugging Face
tokenizer that is spelled out in a text is text here; and for a sentencepiece model that folds runs of spaces,
which none trained by us does, Megatron marks the spaces and splits the text at them, and we do not.

The fast encoder is checked as it goes (`tokens.encoding`). When it is caught in a difference, everything is encoded
again by the tokenizer's own library: what was not checked before cannot be trusted either.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import MalformedLines, RawLine, read_lines, require_readable_file
from megatron_ru.tokens.batch_encoding import Batch, TokeniseSettings, encode_batch
from megatron_ru.tokens.encoding import Encoder, EncoderCounts, load_encoder
from megatron_ru.tokens.indexed_dataset import write_dataset
from megatron_ru.tokens.worker_pool import Encode, WorkerPool

__all__ = ["TokeniseSettings", "TokeniseSummary", "tokenise"]

# Large enough that the way to a worker costs nothing, small enough that two hundred workers fit in memory.
_BATCH_BYTES = 1 << 18


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
    encoder: EncoderCounts
    """What the fast encoder did and how often it was checked."""
    slow_reason: str
    """Why the tokenizer's own library did all the work; empty when fastokens did."""


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
    run = _Run(files, tokenizer_path, prefix, settings, malformed, progress)
    try:
        return run.write(started)
    except _FastEncoderDiffersError as difference:
        run.report(f"{difference}; the run begins again without the fast encoder")
        return run.again_without_fast().write(started)


class _FastEncoderDiffersError(Exception):
    """The fast encoder was caught; what it gave before is not to be trusted."""


@dataclass
class _Run:
    """One way from files to a dataset."""

    files: Sequence[str | os.PathLike[str]]
    tokenizer_path: str | os.PathLike[str]
    prefix: str | os.PathLike[str]
    settings: TokeniseSettings
    malformed: MalformedLines
    progress: Callable[[int], object] | None
    done_bytes: int = 0

    def report(self, note: str) -> None:
        self.malformed.report(note)

    def again_without_fast(self) -> "_Run":
        if self.progress is not None:
            self.progress(-self.done_bytes)
        # Lines that were reported before are counted again and not told again.
        told, report = self.malformed.count, self.malformed.report
        self.malformed.count = 0

        def report_new(message: str) -> None:
            if self.malformed.count > told:
                report(message)

        self.malformed.report = report_new
        return replace(self, settings=replace(self.settings, fast=False), done_bytes=0)

    def write(self, started: float) -> TokeniseSummary:
        notes: dict[str, None] = {}
        encoder = load_encoder(self.tokenizer_path, fast=self.settings.fast, report=lambda note: notes.setdefault(note))
        if self.settings.append_eod and encoder.eos is None:
            raise UserError(
                f"the tokenizer {self.tokenizer_path} has no end-of-sequence token to end documents with; "
                "pass --no-append-eod, or a tokenizer that has one"
            )
        counts = EncoderCounts()
        text_bytes = 0
        with (
            write_dataset(self.prefix, encoder.vocabulary_size) as writer,
            _encoding(encoder, self.settings) as encode,
        ):
            for batch, encoded in encode(_batches(read_lines(self.files, self.settings.text_field))):
                counts += encoded.counts
                if encoded.counts.differed:
                    raise _FastEncoderDiffersError(encoded.note)
                if encoded.note and not notes:
                    notes[encoded.note] = None
                    self.report(encoded.note)
                for file, number, reason in encoded.malformed:
                    self.malformed.add(file, number, reason)
                writer.add_documents(encoded.ids, encoded.lengths)
                text_bytes += batch.text_bytes
                self.done_bytes += batch.stored_bytes
                if self.progress is not None:
                    self.progress(batch.stored_bytes)
            if writer.tokens == 0:
                names = ", ".join(map(str, self.files))
                raise UserError(f"no document with a token in {names}; a dataset must not be empty")
        return TokeniseSummary(
            documents=writer.documents, tokens=writer.tokens, text_bytes=text_bytes, malformed=self.malformed.count,
            dtype=str(writer.dtype), seconds=time.monotonic() - started, encoder=counts,
            slow_reason=encoder.slow_reason,
        )  # fmt: skip


def _batches(lines: Iterable[RawLine]) -> Iterator[Batch]:
    batch = Batch()
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
            batch = Batch()
    if batch.lines:
        yield batch


def _encoding(encoder: Encoder, settings: TokeniseSettings) -> AbstractContextManager[Encode]:
    """A context that gives a function from batches to batches with their encodings, in the same order."""
    if settings.workers > 1:
        return WorkerPool(encoder.path, settings)
    return nullcontext(lambda batches: ((batch, encode_batch(encoder, settings, batch)) for batch in batches))
