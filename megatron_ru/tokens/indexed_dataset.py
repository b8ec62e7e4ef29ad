"""Megatron's dataset of token ids: `PREFIX.bin` with the ids, `PREFIX.idx` with where each document lies.

The index, little-endian (NVIDIA/Megatron-LM: megatron/core/datasets/indexed_dataset.py, core 0.19):

    9 bytes     b"MMIDIDX\\0\\0"
    uint64      version, 1
    uint8       code of the ids' dtype: 4 is int32, 8 is uint16
    uint64      number of sequences
    uint64      number of document boundaries, one more than there are documents
    int32[]     tokens of each sequence
    int64[]     byte offset of each sequence in the .bin
    int64[]     the sequence with which each document begins, and at the end the number of sequences
    int8[]      modes of the sequences; multimodal datasets only

A document without tokens has a boundary and no sequence.
"""

import errno
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output
from megatron_ru.foundation.lock import sole_writer

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, npt.DTypeLike] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
    6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}

# Elements handled at once: 8 to 64 MB, so that memory does not grow with the dataset.
_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 when the vocabulary is smaller than 65500, else int32: `DType.optimal_dtype` of Megatron."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDatasetWriter:
    """Appends documents to a dataset; made by `write_dataset`."""

    def __init__(self, dtype: np.dtype[Any], token_stream: IO[bytes], length_stream: IO[bytes]) -> None:
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._tokens = token_stream
        self._lengths = length_stream

    def add_documents(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Appends one document for each of `lengths`; their tokens lie one after the other in `ids`."""
        assert ids.dtype == self.dtype
        assert int(lengths.sum()) == len(ids)
        self._tokens.write(ids.tobytes())
        self._lengths.write(lengths.astype("<i4", copy=False).tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)


@contextmanager
def write_dataset(prefix: str | os.PathLike[str], vocab_size: int) -> Iterator[IndexedDatasetWriter]:
    """Yields a writer; when the block ends well, `prefix`.bin and then `prefix`.idx appear, complete.

    When it raises, nothing appears and an older dataset stays as it was. A crash between the two renames
    leaves a .bin without an .idx, which no reader accepts. Memory does not grow with the dataset: the
    lengths of documents wait in an unnamed file beside it. Raises UserError when the disk is full, the
    folder cannot be written (any OSError of the block is taken for one of these), or another process is
    writing this dataset.
    """
    bin_path, idx_path = dataset_paths(prefix)
    dtype = token_dtype(vocab_size)
    try:
        with (
            sole_writer(prefix, "the dataset"),
            _without_leftovers(bin_path, idx_path),
            atomic_output(idx_path) as idx_stream,
            atomic_output(bin_path) as bin_stream,
            tempfile.TemporaryFile(dir=bin_path.parent) as length_stream,
        ):
            writer = IndexedDatasetWriter(dtype, bin_stream, length_stream)
            yield writer
            length_stream.flush()
            _write_index(idx_stream, dtype, length_stream, writer.documents)
            for stream in (bin_stream, idx_stream):
                stream.flush()
                os.fsync(stream.fileno())
            # From here on only renames are left. An old index must not meet the new tokens.
            with suppress(FileNotFoundError):
                idx_path.unlink()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_write(error, bin_path) from None


@contextmanager
def _without_leftovers(*paths: Path) -> Iterator[None]:
    """Removes what a killed run began to write; the lock says that nobody is at it any more."""
    beginnings = tuple(f".{path.name}." for path in paths)
    for file in paths[0].parent.iterdir():
        if file.name.startswith(beginnings) and file.name.endswith(".partial"):
            file.unlink(missing_ok=True)
    yield


class IndexedDataset:
    """The sequences of a dataset by number, read on demand. Raises UserError when the index is damaged."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = dataset_paths(prefix)
        _require_pair(self.bin_path, self.idx_path)
        header = _read_header(self.idx_path)
        self.dtype = header.dtype
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        self.sequence_lengths: npt.NDArray[np.int32] = index[header.lengths_at : header.pointers_at].view("<i4")
        """Tokens, int32 [sequences]."""
        self.sequence_pointers: npt.NDArray[np.int64] = index[header.pointers_at : header.documents_at].view("<i8")
        """Bytes, int64 [sequences]."""
        self.document_indices: npt.NDArray[np.int64] = index[header.documents_at : header.modes_at].view("<i8")
        """Sequences, int64 [documents + 1]."""
        # A damaged file may end within an id, and an empty one cannot be mapped.
        count = self.bin_path.stat().st_size // self.dtype.itemsize
        self._tokens: npt.NDArray[Any] = (
            np.memmap(self.bin_path, self.dtype, "r", shape=(count,)) if count else np.empty(0, self.dtype)
        )

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> npt.NDArray[Any]:
        """The ids of a sequence, a view of the file."""
        start = int(self.sequence_pointers[sequence]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.sequence_lengths[sequence])]

    @property
    def documents(self) -> int:
        """The number of documents, those without tokens included."""
        return len(self.document_indices) - 1

    def document(self, number: int) -> npt.NDArray[Any]:
        """The ids of a document, of all its sequences; empty when it has none."""
        first, last = (int(bound) for bound in self.document_indices[number : number + 2])
        parts = [self[sequence] for sequence in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What `check_dataset` found."""

    documents: int
    """Those without tokens included."""
    sequences: int
    tokens: int
    dtype: str
    """Of the ids: `uint16` or `int32`, as a rule."""
    bytes: int
    """Of the .bin."""
    max_token: int | None
    """The highest id; None when the ids were not read."""


def check_dataset(
    prefix: str | os.PathLike[str], vocab_size: int | None = None, *, sample: bool = False
) -> DatasetSummary:
    """What `prefix`.bin and .idx hold. With `vocab_size` every id is read and compared with it, or with `sample`
    at most 32 million of them, spread evenly: a trainer must not read terabytes before its first step.

    Raises UserError, in one sentence, when a file is missing, the index is damaged or cut off, the .bin
    is not of the size that the index promises, or an id is not in the vocabulary.
    """
    dataset = IndexedDataset(prefix)
    tokens = _check_index(dataset)
    expected, found = tokens * dataset.dtype.itemsize, dataset.bin_path.stat().st_size
    if found < expected:
        raise UserError(
            f"{dataset.bin_path} is truncated: its index promises {expected} bytes ({tokens} tokens of "
            f"{dataset.dtype}), the file has {found}; tokenise again or copy it again"
        )
    if found > expected:
        raise UserError(
            f"{dataset.bin_path} does not belong to its index: the index promises {expected} bytes ({tokens} "
            f"tokens of {dataset.dtype}), the file has {found}; tokenise again or copy both files again"
        )
    highest = None
    if vocab_size is not None:
        highest = max_token(prefix, sample=sample)
        if highest >= vocab_size:
            raise UserError(
                f"{dataset.bin_path} holds the token id {highest}, but the vocabulary has {vocab_size} ids "
                f"(0 to {vocab_size - 1}): it was made with another tokenizer; tokenise again with this one"
            )
    return DatasetSummary(
        documents=dataset.documents, sequences=len(dataset), tokens=tokens, dtype=str(dataset.dtype),
        bytes=found, max_token=highest,
    )  # fmt: skip


def max_token(prefix: str | os.PathLike[str], *, sample: bool = False) -> int:
    """The highest token id of the dataset, -1 when it is empty; the file is read once, in pieces, or with `sample`
    in 64 pieces of half a million ids.

    Raises UserError when the ids are no whole numbers, or one is negative.
    """
    bin_path, idx_path = dataset_paths(prefix)
    _require_pair(bin_path, idx_path)
    dtype = _read_header(idx_path).dtype
    if dtype.kind not in "iu":
        raise UserError(f"{idx_path} says that its elements are {dtype}; token ids are whole numbers")
    highest = -1
    total = bin_path.stat().st_size // dtype.itemsize
    piece = 8 * _CHUNK
    starts = range(0, total, piece)
    if sample and total > 64 * (_CHUNK // 2):
        piece = _CHUNK // 2
        starts = range(0, total, -(-total // 64))
    with bin_path.open("rb") as stream:
        for start in starts:
            stream.seek(start * dtype.itemsize)
            ids = np.fromfile(stream, dtype=dtype, count=piece)
            highest = max(highest, int(ids.max()))
            if (lowest := int(ids.min())) < 0:
                raise UserError(f"{bin_path} holds the token id {lowest}; ids begin at 0, so the file is damaged")
    return highest


def dataset_paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The .bin and the .idx of `prefix`, which is given without a suffix, as to Megatron's `--data-path`.

    Raises UserError when it has one.
    """
    text = os.fspath(prefix)
    if text.endswith((".bin", ".idx")):
        raise UserError(f"{text} is one of the two files of a dataset; give their common prefix {text[:-4]}")
    if not text or text.endswith("/"):
        raise UserError(f"{text!r} is no prefix of a dataset; give a path such as data/ru, for data/ru.bin and .idx")
    return Path(text + ".bin"), Path(text + ".idx")


@dataclass(frozen=True)
class _Header:
    """The dtype of the ids, and where the parts of the index begin, in bytes."""

    dtype: np.dtype[Any]
    sequences: int
    boundaries: int

    @property
    def lengths_at(self) -> int:
        return _HEADER.size

    @property
    def pointers_at(self) -> int:
        return self.lengths_at + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        return self.pointers_at + 8 * self.sequences

    @property
    def modes_at(self) -> int:
        return self.documents_at + 8 * self.boundaries


def _write_index(stream: IO[bytes], dtype: np.dtype[Any], length_stream: IO[bytes], documents: int) -> None:
    """Writes the index of `documents` whose lengths lie in `length_stream`, one pass for each part."""

    def lengths() -> Iterator[npt.NDArray[np.int32]]:
        length_stream.seek(0)
        while chunk := length_stream.read(4 * _CHUNK):
            yield np.frombuffer(chunk, dtype="<i4")

    sequences = sum(int(np.count_nonzero(chunk)) for chunk in lengths())
    stream.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], sequences, documents + 1))
    for chunk in lengths():
        stream.write(chunk[chunk > 0].tobytes())
    offset = 0
    for chunk in lengths():
        sizes = chunk[chunk > 0].astype("<i8") * dtype.itemsize
        stream.write((offset + np.cumsum(sizes) - sizes).tobytes())
        offset += int(sizes.sum())
    boundary = 0
    stream.write(struct.pack("<q", boundary))
    for chunk in lengths():
        stream.write((boundary + np.cumsum(chunk > 0, dtype="<i8")).tobytes())
        boundary += int(np.count_nonzero(chunk))


def _require_pair(bin_path: Path, idx_path: Path) -> None:
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        raise UserError(
            f"there is no {' and no '.join(missing)}; a dataset is a pair of .bin and .idx, which "
            "`megatron-ru data tokenize --output PREFIX` writes"
        )


def _read_header(idx_path: Path) -> _Header:
    try:
        size = idx_path.stat().st_size
        with idx_path.open("rb") as stream:
            raw = stream.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"cannot read {idx_path}: {error.strerror}") from None
    if len(raw) < _HEADER.size:
        raise UserError(f"{idx_path} is truncated: it has {size} bytes, and its header alone is {_HEADER.size}")
    magic, version, code, sequences, boundaries = _HEADER.unpack(raw)
    if magic != _MAGIC:
        raise UserError(f"{idx_path} is no index of a Megatron dataset: it begins with {magic!r}, not {_MAGIC!r}")
    if version != _VERSION:
        raise UserError(f"{idx_path} has the index version {version}; only version {_VERSION} is known")
    if code not in _DTYPES:
        raise UserError(f"{idx_path} has the dtype code {code}; known are {min(_DTYPES)} to {max(_DTYPES)}")
    header = _Header(np.dtype(_DTYPES[code]), sequences, boundaries)
    if size < header.modes_at:
        raise UserError(
            f"{idx_path} is truncated: {sequences} sequences and {boundaries} document boundaries take "
            f"{header.modes_at} bytes, the file has {size}; tokenise again or copy it again"
        )
    # Multimodal datasets have one byte more for each sequence.
    if size not in (header.modes_at, header.modes_at + sequences):
        raise UserError(
            f"{idx_path} is damaged: {sequences} sequences and {boundaries} document boundaries take "
            f"{header.modes_at} bytes, the file has {size}; tokenise again or copy it again"
        )
    return header


def _check_index(dataset: IndexedDataset) -> int:
    """The number of tokens that the index promises. Raises UserError when its parts contradict each other."""
    tokens = 0
    for start in range(0, len(dataset), _CHUNK):
        lengths = dataset.sequence_lengths[start : start + _CHUNK].astype(np.int64)
        pointers = dataset.sequence_pointers[start : start + _CHUNK]
        expected = (tokens + np.cumsum(lengths) - lengths) * dataset.dtype.itemsize
        if lengths.min() < 0 or not np.array_equal(pointers, expected):
            raise UserError(f"{dataset.idx_path} is damaged: its sequences do not follow one another; tokenise again")
        tokens += int(lengths.sum())
    bounds = dataset.document_indices
    ordered = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(dataset)
    for start in range(0, len(bounds), _CHUNK):
        ordered = ordered and bool(np.all(np.diff(bounds[start : start + _CHUNK + 1]) >= 0))
    if not ordered:
        raise UserError(
            f"{dataset.idx_path} is damaged: its document boundaries do not rise from 0 to the "
            f"{len(dataset)} sequences; tokenise again"
        )
    return tokens


def _cannot_write(error: OSError, bin_path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space is left for {bin_path} ({error.strerror}); nothing was kept: free some space in "
            f"{bin_path.parent}, or give an --output on another disk"
        )
    return UserError(f"cannot write {bin_path}: {error.strerror or error}; nothing was kept")
