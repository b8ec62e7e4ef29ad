"""The processes of this host as Linux shows them under /proc."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One process at the moment of looking. A number alone is no identity: Linux gives it away again."""

    pid: int
    start: int
    """Clock ticks from boot to its start."""
    parent: int
    group: int
    session: int
    name: str
    """The first 15 letters of its name."""
    letter: str
    """R running, S and D asleep, T stopped, Z dead and not yet taken leave of."""

    @property
    def alive(self) -> bool:
        """Whether it can still do anything."""
        return self.letter not in ("Z", "X")


def look_at(pid: int) -> Process | None:
    """That process, None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            written = stream.read()
    except OSError:
        return None
    # The second field is a name in brackets that may hold anything.
    fields = written[written.rindex(b")") + 2 :].split()
    return Process(
        pid=pid,
        name=written[written.index(b"(") + 1 : written.rindex(b")")].decode(errors="replace"),
        start=int(fields[19]),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        letter=fields[0].decode(),
    )


def all_processes() -> dict[int, Process]:
    """Every process, by its number."""
    found = (look_at(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def below(ancestor: int, table: dict[int, Process]) -> list[Process]:
    """The children of `ancestor`, their children, and so on."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [ancestor]
    while waiting:
        for child in children.pop(waiting.pop(), []):
            found.append(child)
            waiting.append(child.pid)
    return found


def variable(pid: int, name: str) -> str | None:
    """The value with which that process was started; None where it has none or is somebody else's."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            environ = stream.read()
    except OSError:
        return None
    mark = name.encode() + b"="
    for entry in environ.split(b"\0"):
        if entry.startswith(mark):
            return entry[len(mark) :].decode(errors="replace")
    return None


def catches(pid: int, number: int) -> bool:
    """Whether that process has a handler for the signal."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def holds(pid: int, path: str) -> bool:
    """Whether that process has the file open, or mapped into its memory."""
    with suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(descriptor.path) == path:
                    return True
    with suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as stream:
        return any(line.rstrip("\n").endswith(f" {path}") for line in stream)
    return False


def send(process: Process, number: int) -> bool:
    """Sends the signal to that very process; False where it is gone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        now = look_at(process.pid)
        if now is None or now.start != process.start:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def send_all(processes: Iterable[Process], number: int) -> None:
    """Sends the signal to each."""
    for process in processes:
        send(process, number)
