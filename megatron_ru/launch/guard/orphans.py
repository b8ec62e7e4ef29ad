"""Ranks whose keeper is gone: found by what they carry in their environment, and ended."""

import os
import re
import signal
import time

from megatron_ru.launch.guard.processes import Process, all_processes, look_at, send_all, variable

MARK = "RU_KEEPER"
"""The variable in the environment of a rank and of all that it starts: `job:attempt:pid:start` of its keeper."""


def mark_of(job: str, attempt: int, keeper: Process) -> str:
    """The value for the ranks of that keeper."""
    return f"{job}:{attempt}:{keeper.pid}:{keeper.start}"


def marked(mark: str) -> list[Process]:
    """Every living process of this user that carries this mark."""
    return [process for process in _own() if process.alive and variable(process.pid, MARK) == mark]


def orphans() -> list[tuple[Process, str]]:
    """Every living process of this user whose keeper is gone, with the mark that says so."""
    found = []
    for process in _own():
        mark = variable(process.pid, MARK) if process.alive else None
        if mark is not None and not _keeper_lives(mark):
            found.append((process, mark))
    return found


def end_orphans(patience: float = 0.3) -> list[tuple[Process, str]]:
    """Kills them and returns them. Waits a moment first: a reaper may be about to end them with more grace."""
    found = orphans()
    if found:
        time.sleep(patience)
        send_all((process for process, _ in found), signal.SIGKILL)
    return found


def _own() -> list[Process]:
    # In another namespace of process numbers a keeper has another number, and would seem to be gone.
    user, here = os.getuid(), _namespace("self")
    own = []
    for process in all_processes().values():
        try:
            mine = os.stat(f"/proc/{process.pid}").st_uid == user and _namespace(str(process.pid)) == here
        except OSError:
            continue
        if mine and process.pid != os.getpid():
            own.append(process)
    return own


def _namespace(process: str) -> str:
    return os.readlink(f"/proc/{process}/ns/pid")


def _keeper_lives(mark: str) -> bool:
    parts = re.fullmatch(r".*:\d{1,9}:(\d{1,9}):(\d{1,18})", mark, re.ASCII)
    if parts is None:
        # Whoever wrote this is no keeper of ours.
        return True
    keeper = look_at(int(parts[1]))
    return keeper is not None and keeper.alive and keeper.start == int(parts[2])
