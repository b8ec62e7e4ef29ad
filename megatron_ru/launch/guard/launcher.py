"""The program under the guard, which starts the ranks: mpirun, srun, torchrun, or a shell."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from megatron_ru.launch.guard.ending import Ending
from megatron_ru.launch.guard.processes import Process, all_processes, below
from megatron_ru.launch.guard.reaper import NAME as REAPER_NAME

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_FIRST_PORT, _PORTS = 10000, 20000
_PROBE_SECONDS = 1.0
# Before the guard raises it for itself.
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)


class Launcher:
    """The launcher of one attempt, in a session of its own, started when this is made."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]):
        self.code: int | None = None
        """The exit code, 128 + signal where it was killed; None while it runs."""
        # What a launcher leaves behind becomes ours, and can be found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._ending: Ending | None = None
        self._child: subprocess.Popen[bytes] | None = None
        try:
            self._child = subprocess.Popen(
                list(words), env=dict(environ), start_new_session=True, close_fds=False, preexec_fn=_as_if_unguarded
            )  # fmt: skip
        except OSError as error:
            print(f"megatron-ru guard: {words[0]}: {error.strerror}", file=sys.stderr, flush=True)
            self.code = 126 if isinstance(error, PermissionError) else 127

    def poll(self) -> int | None:
        """The exit code once it has one; the dead that it left to us are buried."""
        if self._child is not None and self.code is None:
            code = self._child.poll()
            if code is not None:
                self.code = 128 - code if code < 0 else code
        if self.code is not None:
            _bury()
        return self.code

    def signal(self, number: int) -> None:
        """Sends the signal to the launcher itself."""
        if self._child is not None and self.code is None:
            self._child.send_signal(number)

    def end(self, grace: float, now: float) -> bool:
        """TERM at the first call, KILL after `grace`, to it and all below it; True when nobody is left."""
        if self._ending is None:
            self._ending = Ending(_all_below, grace, now)
        gone = self._ending.step(now)
        self.poll()
        return gone and self.code is not None


def _as_if_unguarded() -> None:
    """In the launcher's process, before it begins: it ends with its guard, and may open as many files as without."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, _FILES)


def _all_below() -> list[Process]:
    # Reapers outlive what they watch, and end by themselves.
    return [one for one in below(os.getpid(), all_processes()) if one.name != REAPER_NAME]


def _bury() -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def port_of_attempt(written: str | None, attempt: int, address: str, taken: Sequence[int] = ()) -> str | None:
    """MASTER_PORT of that attempt: as given for the first, then one further each time, free as far as can be seen.

    The store of an attempt that was killed may hold its port for a while.
    """
    if written is None or not written.isdigit() or attempt == 0:
        return written
    port = int(written)
    for _ in range(attempt):
        port = _next(port)
        for _ in range(100):
            if port not in taken and not _listens("127.0.0.1", port) and not _listens(address, port):
                break
            port = _next(port)
    return str(port)


def _next(port: int) -> int:
    inside = _FIRST_PORT <= port < _FIRST_PORT + _PORTS
    return _FIRST_PORT + (port + 1 - _FIRST_PORT) % _PORTS if inside else port + 1


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False
