"""CRC32 of files, in pieces, so that many threads and ranks share even one large file.

Accidents are what is looked for: CRC32 sees every flipped bit, every burst of up to 32 bits, and misses one of 4e9
other changes. It is in the standard library and runs at 7 GB/s on one core of an AMD EPYC (SHA-256: 2 GB/s).
"""

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """Size and checksums of one file."""

    path: str
    """Relative to the folder of the checkpoint, with / between its parts."""
    bytes: int
    crc32: tuple[int, ...]
    """Of each piece of `PIECE_BYTES`, the last one shorter; none for an empty file."""


def sum_files(folder: Path, paths: Iterable[str], *, threads: int) -> list[FileSum]:
    """The sums of files that were just written, each of which reaches the disk first.

    Raises OSError when one cannot be read or synced.
    """

    def size_of(path: str) -> int:
        descriptor = os.open(folder / path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    names = sorted(paths)
    sizes = _in_threads(size_of, names, threads)
    pieces = [
        (name, index)
        for name, size in zip(names, sizes, strict=True)
        for index in range(piece_count(size, PIECE_BYTES))
    ]
    sums = iter(_in_threads(lambda piece: piece_sum(folder / piece[0], piece[1], PIECE_BYTES), pieces, threads))
    return [
        FileSum(path=name, bytes=size, crc32=tuple(next(sums) for _ in range(piece_count(size, PIECE_BYTES))))
        for name, size in zip(names, sizes, strict=True)
    ]


def changed_pieces(folder: Path, pieces: Sequence[tuple[FileSum, int]], piece_bytes: int, *, threads: int) -> list[str]:
    """One sentence for each piece (file, number of the piece) that is not as it was summed."""

    def compare(piece: tuple[FileSum, int]) -> str | None:
        file, index = piece
        place = f"{folder.name}/{file.path}"
        try:
            found = piece_sum(folder / file.path, index, piece_bytes)
        except OSError as error:
            return f"{place} cannot be read ({error.strerror})"
        if found == file.crc32[index]:
            return None
        first, last = index * piece_bytes, min((index + 1) * piece_bytes, file.bytes)
        return (
            f"{place} was changed between bytes {first} and {last} "
            f"(CRC32 {found:08x}, expected {file.crc32[index]:08x})"
        )

    return [sentence for sentence in _in_threads(compare, pieces, threads) if sentence is not None]


def piece_sum(path: Path, index: int, piece_bytes: int) -> int:
    """CRC32 of one piece of a file."""
    crc, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        position, end = index * piece_bytes, (index + 1) * piece_bytes
        while position < end:
            count = os.preadv(descriptor, [block[: end - position]], position)
            if count == 0:
                break
            crc = zlib.crc32(block[:count], crc)
            position += count
    finally:
        os.close(descriptor)
    return crc


def piece_count(size: int, piece_bytes: int) -> int:
    """How many pieces a file of `size` bytes has."""
    return -(-size // piece_bytes)


def _in_threads[Item, Result](work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    if threads <= 1 or len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(work, items))
