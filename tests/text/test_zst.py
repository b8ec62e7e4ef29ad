import io
import random
from pathlib import Path

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.zst import ZstdReader

zstandard = pytest.importorskip("zstandard")

# Random, so that it does not compress, and longer than one chunk of the reader (256 KiB).
CONTENT = random.Random(0).randbytes(600_000)


def read(stored: bytes) -> bytes:
    return ZstdReader.open(Path("a.zst"), io.BytesIO(stored)).read()


def test_frames_one_after_another_are_one_stream():
    compressor = zstandard.ZstdCompressor()
    frames = [compressor.compress(part) for part in (CONTENT, b"", b"tail")]
    assert read(b"".join(frames)) == CONTENT + b"tail"


@pytest.mark.parametrize("missing", [1, 3, 4096, 300_000])
def test_a_cut_off_frame_is_an_error(missing):
    stored = zstandard.ZstdCompressor().compress(CONTENT)
    with pytest.raises(EOFError):
        read(stored[:-missing])


def test_something_else_is_an_error_with_the_name():
    with pytest.raises(UserError, match=r"a\.zst is not sound zstd"):
        read(b"no archive at all")
