"""The sign of life of one rank: a file of 64 bytes that the rank writes and its keeper reads.

Little endian: 8 bytes `RUBEAT01`, then three int64: the counter of beats, the last completed step (-1 before the
first), the phase; the rest is zero. A counter that changed is a beat: no two clocks are compared. Beside it the rank
leaves `FILE.failure` when it ends by an exception, and `FILE.stacks` on the signal `STACKS_SIGNAL`.

The rank writes with `pwrite`. A mapped page would cost 0.5 µs less and end the process with SIGBUS once somebody
truncates the file.
"""

import faulthandler
import json
import logging
import os
import signal
import struct
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

from megatron_ru.foundation.files import atomic_output

VARIABLE = "RU_HEARTBEAT"
"""The environment variable that names the file."""
STACKS_SIGNAL = signal.SIGRTMIN + 7
"""On this signal the rank appends the Python stacks of all its threads to `FILE.stacks`. Send it to the rank alone:
other processes of its group die of it."""

_MAGIC = b"RUBEAT01"
_SIZE = 64
_RECORD = struct.Struct("<qqq")
_LONGEST_TRACEBACK = 20_000
_log = logging.getLogger(__name__)


class Phase(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    TRAINING = 1
    EVALUATING = 2
    SAVING = 3
    ENDED = 4


@dataclass(frozen=True)
class Beat:
    """What the file says now."""

    counter: int
    """Beats so far; 0 when the rank has not opened the file."""
    step: int
    """The last completed step, -1 before the first."""
    phase: Phase


class Heartbeat:
    """The writer. Nothing in here raises: training goes on without its heartbeat."""

    def __init__(self, path: str | os.PathLike[str], descriptor: int):
        self.path = Path(path)
        self.step = -1
        self.phase = Phase.STARTING
        self._descriptor = descriptor
        self._counter = 0
        self._stacks: IO[str] | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Heartbeat | None":
        """The heartbeat into the file that RU_HEARTBEAT names, or None, told in the log where it cannot be written."""
        path = environ.get(VARIABLE)
        if not path:
            return None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(descriptor, len(_MAGIC), 0) != _MAGIC:
                os.close(descriptor)
                _log.warning("%s=%s is not a file of heartbeats; this rank sends none", VARIABLE, path)
                return None
        except OSError as error:
            _log.warning("%s=%s cannot be written (%s); this rank sends no heartbeats", VARIABLE, path, error)
            return None
        return cls(path, descriptor)

    def beat(self, step: int | None = None, phase: Phase | None = None) -> None:
        """One sign of life in 1 µs; a step or phase that is not given stays as it was."""
        if step is not None:
            self.step = step
        if phase is not None:
            self.phase = phase
        self._counter += 1
        try:  # noqa: SIM105 (suppress would take a third of the time)
            os.pwrite(self._descriptor, _RECORD.pack(self._counter, self.step, self.phase), len(_MAGIC))
        except OSError:
            # A disk that is full or gone is no reason to stop training.
            pass

    def failed(self, error: BaseException, step: int | None = None, rank: int | None = None) -> None:
        """Leaves `FILE.failure`, unless an earlier failure is told there: what was raised at which step, and where.
        The rank is RANK unless given."""
        target = failure_path(self.path)
        # An exception that cannot be printed, a RANK that is no number: what is reported must not hide what happened.
        with suppress(Exception):
            if target.exists() or not target.parent.is_dir():
                return
            report = {
                "rank": _rank() if rank is None else rank,
                "step": self.step if step is None else step,
                "exception": type(error).__name__,
                "message": str(error),
                "where": where(error),
                "traceback": "".join(traceback.format_exception(error))[-_LONGEST_TRACEBACK:],
            }
            with atomic_output(target, "w", encoding="utf-8", errors="replace") as stream:
                json.dump(report, stream, ensure_ascii=False)

    def register_stacks(self) -> None:
        """From now on `STACKS_SIGNAL` appends all Python stacks to `FILE.stacks`, also while a collective hangs."""
        with suppress(OSError, RuntimeError, ValueError):
            # Kept open: at the signal there is no time for more than writing.
            self._stacks = open(stacks_path(self.path), "a", encoding="utf-8")  # noqa: SIM115
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)

    def close(self) -> None:
        """Stops listening and closes the files."""
        if self._stacks is not None:
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()
            self._stacks = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def create_beat_file(path: str | os.PathLike[str]) -> None:
    """Makes the file that a rank will beat in, replacing an older one and what an older rank left beside it."""
    with atomic_output(path) as stream:
        stream.write((_MAGIC + _RECORD.pack(0, -1, Phase.STARTING)).ljust(_SIZE, b"\0"))
    for left in (failure_path(path), stacks_path(path)):
        left.unlink(missing_ok=True)


def read_beat(path: str | os.PathLike[str]) -> Beat | None:
    """What the file says now, None when there is no such file or it is not one of heartbeats."""
    try:
        content = Path(path).read_bytes()
        counter, step, phase = _RECORD.unpack_from(content, len(_MAGIC))
        return Beat(counter, step, Phase(phase)) if content.startswith(_MAGIC) else None
    except (OSError, struct.error, ValueError):
        return None


def read_failure(path: str | os.PathLike[str]) -> dict[str, str | int] | None:
    """What the rank of this heartbeat file said when it ended by an exception, None when it said nothing."""
    try:
        report = json.loads(failure_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def failure_path(path: str | os.PathLike[str]) -> Path:
    """Where the rank of this heartbeat file tells its exception."""
    return Path(f"{os.fspath(path)}.failure")


def stacks_path(path: str | os.PathLike[str]) -> Path:
    """Where the rank of this heartbeat file leaves its stacks."""
    return Path(f"{os.fspath(path)}.stacks")


def where(error: BaseException) -> str:
    """`FILE:LINE in FUNCTION` of the innermost frame, empty when the exception was never raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _rank() -> int:
    written = os.environ.get("RANK", "")
    return int(written) if written.isascii() and written.isdecimal() else 0
