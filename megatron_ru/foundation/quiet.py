"""Silence for libraries that print."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_ru.foundation.errors import UserError


@contextmanager
def held_output() -> Iterator[None]:
    """Keeps what the block writes to stdout and stderr, C++ included, and shows it on stderr if the block fails.

    A `UserError` says all there is to say: nothing is shown with it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as held:
        failed = False
        os.dup2(held.fileno(), 1)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            failed = True
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                held.seek(0)
                sys.stderr.write(held.read().decode("utf-8", errors="replace"))
                sys.stderr.flush()
