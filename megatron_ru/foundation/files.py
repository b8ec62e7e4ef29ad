"""Outputs that are either whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_ru.foundation.errors import UserError


@contextmanager
def atomic_output(path: str | os.PathLike[str], mode: str = "wb", **open_arguments: Any) -> Iterator[IO[Any]]:
    """Yields a file under a temporary name; on success it is fsynced and renamed to `path`.

    When the block raises, nothing remains of it and an older `path` stays as it was.
    The parent folder is created. `mode` is `"w"` or `"wb"`; `open_arguments` go to `open`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    try:
        with os.fdopen(descriptor, mode, **open_arguments) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files that only the owner reads; give this one what open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def requested_output(path: str | os.PathLike[str], mode: str = "wb", **open_arguments: Any) -> Iterator[IO[Any]]:
    """`atomic_output` of a file that the user named. Raises UserError when it cannot be written."""
    try:
        with atomic_output(path, mode, **open_arguments) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was kept") from None


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
