"""The process that ends a rank whose keeper was killed: a launcher's daemon kills without asking."""

import os
import shutil
import signal
import time
from contextlib import suppress

from megatron_ru.launch.guard.ending import Ending
from megatron_ru.launch.guard.orphans import marked
from megatron_ru.launch.guard.processes import Process, all_processes, below

NAME = "ru-reaper"
"""What such a process is called in a list of processes."""

_DONE = b"done"
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


class Reaper:
    """The keeper's end of the pipe to its reaper, which is forked when this is made."""

    def __init__(self, mark: str, grace: float, folder: str):
        """The reaper ends all that carries `mark` and removes `folder` when the keeper leaves without `dismiss`."""
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._writing)
                _wait_and_end(reading, mark, grace, folder)
                code = 0
            finally:
                os._exit(code)
        os.close(reading)

    def dismiss(self) -> None:
        """Tells the reaper that nothing is left to do, and takes leave of it."""
        with suppress(OSError):
            os.write(self._writing, _DONE)
        os.close(self._writing)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def tell(self, what: str, value: float, start: int = 0) -> None:
        """Tells the reaper the `session` of the rank, the seconds of `grace` that the guard has named, or the number
        and `start` of a `process` below the keeper, by which it is found whatever it does to its environment."""
        with suppress(OSError):
            os.write(self._writing, f"{what} {value} {start}\n".encode())


def _wait_and_end(reading: int, mark: str, grace: float, folder: str) -> None:
    os.setsid()
    with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as stream:
        stream.write(NAME)
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A launcher waits until nobody holds the other end of a rank's output.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    said = b""
    while piece := os.read(reading, 4096):
        said += piece
    *lines, last = said.split(b"\n")
    if last == _DONE:
        return
    told = [line.decode().split() for line in lines]
    graces = [float(value) for what, value, _ in told if what == "grace"]
    sessions = {int(value) for what, value, _ in told if what == "session"}
    known = {(int(value), int(start)) for what, value, start in told if what == "process"}

    def find() -> list[Process]:
        table = all_processes()
        there = [one for one in table.values() if one.session in sessions or (one.pid, one.start) in known]
        there += marked(mark)
        # A child of one that is found is known from then on, since the parent may end first.
        there += [child for one in there for child in below(one.pid, table)]
        found = {(one.pid, one.start): one for one in there}
        known.update(found)
        return list(found.values())

    ending = Ending(find, [grace, *graces][-1], time.monotonic())
    while not ending.step(time.monotonic()):
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
