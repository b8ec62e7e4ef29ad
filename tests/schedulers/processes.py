"""Processes as /proc shows them, on whichever host they run."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process on a host, as it is seen from outside."""

    pid: int
    """Its number outside the host."""
    name: str
    words: tuple[str, ...]
    state: str
    """R, S, D, T (stopped), Z (zombie), as in /proc."""

    def __str__(self) -> str:
        return f"{self.pid} {self.state} {' '.join(self.words)[:120] or self.name}"


def read_process(pid: int) -> Process | None:
    """What /proc says of a process, None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, rest = status[status.index("(") + 1 :].rsplit(")", 1)
    return Process(pid, name, tuple(words.decode(errors="replace").split("\0")[:-1]), rest.split()[0])


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def pid_namespace(pid: int) -> str | None:
    """What tells one host's processes from another's; None for a process that has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
