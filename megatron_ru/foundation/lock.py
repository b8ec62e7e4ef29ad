"""One writer at a time."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ru.foundation.errors import UserError


@contextmanager
def sole_writer(target: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Holds an advisory lock beside `target` while the block runs; it goes with the process, however that ends.

    Raises UserError when another process holds it. A file system without locks is not held against anybody.
    """
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise UserError(
                    f"another process is writing {what} {target}; wait for it, or give another name"
                ) from None
        # The holder before us removes the file when it is done: then this is a lock on nothing.
        try:
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
