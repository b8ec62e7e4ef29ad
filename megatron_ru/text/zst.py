"""Reading `.zst`; a cut-off file, over which `zstandard.stream_reader` passes in silence, is an error."""

import io
from collections.abc import Buffer
from pathlib import Path
from typing import IO, Any

from megatron_ru.foundation.errors import UserError

_CHUNK_BYTES = 1 << 18


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of a stream of zstd frames. Raises EOFError when the last frame is cut off."""

    @classmethod
    def open(cls, path: Path, stored: IO[bytes]) -> IO[bytes]:
        """A buffered reader over `stored`. Raises UserError, which names `path`, without zstandard."""
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"reading {path} needs the package zstandard, which is not installed: pip install 'megatron-ru[data]'"
            ) from None
        return io.BufferedReader(cls(zstandard, path, stored), _CHUNK_BYTES)

    def __init__(self, zstandard: Any, path: Path, stored: IO[bytes]) -> None:
        self._zstandard = zstandard
        self._path = path
        self._stored = stored
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            chunk = self._stored.read(_CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        pieces = []
        try:
            while chunk:
                if self._frame is None:
                    self._frame = self._decompressor.decompressobj()
                pieces.append(self._frame.decompress(chunk))
                chunk = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
        except self._zstandard.ZstdError as error:
            raise UserError(f"{self._path} is not sound zstd ({error}); get it again") from None
        return b"".join(pieces)
