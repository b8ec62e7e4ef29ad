"""One rank's process with all that it starts: begun in a session of its own, watched, and ended."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from megatron_ru.foundation.heartbeat import STACKS_SIGNAL
from megatron_ru.launch.guard.orphans import marked
from megatron_ru.launch.guard.processes import Process, all_processes, below, catches, holds, look_at, send

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class RankProcess:
    """A command, once `start` was called."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], beats: str):
        self.pid = 0
        self.code: int | None = None
        """The exit code, 128 + signal where it was killed; None while it runs."""
        self._words, self._environ, self._beats = words, environ, beats
        self._trainer: Process | None = None

    def start(self) -> None:
        """Starts it; it dies with this process, and what it leaves behind becomes this process's child."""
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        keeper = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
                if os.getppid() != keeper:
                    os._exit(137)
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(number, signal.SIG_DFL)
                os.execvpe(self._words[0], list(self._words), dict(self._environ))
            except OSError as error:
                sys.stderr.write(f"megatron-ru keep: {self._words[0]}: {error.strerror}\n")
                sys.stderr.flush()
                os._exit(126 if isinstance(error, PermissionError) else 127)
            finally:
                os._exit(1)

    def take_leave(self) -> None:
        """Notes the end of this command, and of whatever else has ended below this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = 128 - code if code < 0 else code

    def trainer(self) -> Process | None:
        """The process that beats: a shell or a container may stand before it. None while there is none."""
        if self._trainer is not None:
            now = look_at(self._trainer.pid)
            if now is not None and now.start == self._trainer.start and now.alive:
                return now
        # What it forks holds the file too.
        able = [one for one in below(os.getpid(), all_processes()) if one.alive and holds(one.pid, self._beats)]
        self._trainer = min(able, key=lambda one: (one.start, one.pid), default=None)
        return self._trainer

    def letter(self, opened: bool) -> str:
        """What the trainer does, or the command itself where it has `opened` no file of heartbeats."""
        seen = (self.trainer() if opened else None) or look_at(self.pid)
        return "" if seen is None else seen.letter

    def signal(self, number: int, opened: bool) -> None:
        """Passes a signal on: to the trainer, whose helpers would die of it; to the whole group without one."""
        trainer = self.trainer() if opened else None
        if trainer is not None:
            send(trainer, number)
            return
        if self.code is None:
            os.killpg(self.pid, number)

    def ask_for_stacks(self, opened: bool) -> bool:
        """Whether the trainer was asked; a process that expects no such signal would die of it."""
        trainer = self.trainer() if opened else None
        return trainer is not None and catches(trainer.pid, STACKS_SIGNAL) and send(trainer, STACKS_SIGNAL)


def finder(keeper: int, mark: str, without: Sequence[int] = ()) -> list[Process]:
    """All that this keeper's rank has started: below the keeper, or carrying its mark."""
    table = all_processes()
    found = {one.pid: one for one in [*below(keeper, table), *marked(mark)]}
    return [one for pid, one in found.items() if pid not in (keeper, os.getpid(), *without)]
