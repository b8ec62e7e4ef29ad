"""Where the numbers of a tensor lie in an archive of `torch.save`, without reading them."""

import io
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

# The names under which torch pickles memory of these numbers.
_DTYPES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A contiguous tensor in a file."""

    first: int
    """Offset of its first number in the file, in bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class UnknownArchive(ValueError):
    """Something else than one plain tensor: torch itself must read it."""


def locate(descriptor: int, first: int, length: int) -> SavedTensor:
    """The tensor of the archive in this part of an open file. Raises `UnknownArchive`."""
    try:
        reader = torch._C.PyTorchFileReader(_Part(descriptor, first, length))
        dtype, key, offset, shape, stride = _Unpickler(io.BytesIO(reader.get_record("data.pkl"))).load()
        start = first + reader.get_record_offset(f"data/{key}") + offset * dtype.itemsize
    # Whatever the two say of a file that is none of theirs.
    except Exception as error:
        raise UnknownArchive(str(error)) from error
    if stride != _contiguous(shape):
        raise UnknownArchive("it is not contiguous")
    return SavedTensor(first=start, dtype=dtype, shape=shape)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


class _Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, descriptor: int, first: int, length: int):
        self._descriptor, self._first, self._length, self._position = descriptor, first, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [target], self._first + self._position) if len(target) else 0
        self._position += count
        return count


class _Unpickler(pickle.Unpickler):
    """Gives (dtype, name of the storage, offset, shape, stride) of a pickled tensor, and makes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *rest: (*storage, offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise UnknownArchive(f"it holds {module}.{name}")

    def persistent_load(self, saved: Any) -> Any:
        kind, dtype, key, *_ = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UnknownArchive(f"it holds {kind}")
        return dtype, key
