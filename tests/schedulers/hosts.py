"""Hosts of one machine: each has processes, a network, a name and /etc/hosts of its own, and shares the files.

A host is a set of namespaces (PID, network, UTS, mount) with two network cards, `bond0` and `ib0`; the cards of all
hosts meet in the switches of one more network namespace. `ssh HOST WORDS` works on every host, with the bare
environment that a real one gives. Everything is named `ru-PID-NUMBER-…` after the process that made it, and what a
killed process left behind is deleted by the next one.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.schedulers.processes import Process, children, pid_namespace, read_process
from tests.schedulers.remote_shell import RemoteShell

NETWORKS = {"bond0": "10.77.0", "ib0": "10.78.0"}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What serves a host and is nobody's job.
DAEMONS = frozenset(("slurmctld", "slurmscriptd", "slurmd", "munged", "sge_qmaster", "sge_execd"))

_numbers = itertools.count()
_NAMESPACES = Path("/run/netns")
# The first process of a host waits for the children that others leave to it, and ignores all signals but KILL.
_INIT = """
mount --make-rprivate / && mount -t proc proc /proc && mount --bind "$1" /etc/hosts && hostname "$2" && echo up
while :; do sleep 3600 & wait; done
"""


class Hosts:
    """`names` as hosts whose address on bond0 is 10.77.0.(10 + place). Use it as a context."""

    def __init__(self, folder: Path, names: Sequence[str] = ("h0", "h1", "h2", "h3")):
        self.folder = folder
        self.names = tuple(names)
        self.environment: dict[str, str] = {}
        """What a user has set at login on every host, beside HOME, USER and PATH."""
        self.path = [folder / "bin"]
        """Folders in front of the system's on every host's PATH."""
        self._prefix = f"ru-{os.getpid()}-{next(_numbers)}"
        self._inits: dict[str, subprocess.Popen[str]] = {}
        self._cut: set[str] = set()
        self._remote_shell = RemoteShell(self, folder / "bin")

    def __enter__(self) -> "Hosts":
        _remove_leftovers()
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name} {name}.ci" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        try:
            self._build_network()
            for name in self.names:
                self._start(name)
            self._remote_shell.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remote_shell.stop()
        for name in list(self._inits):
            self._end(name)
        _delete_namespaces(f"{self._prefix}-")

    def address(self, name: str, card: str = "bond0") -> str:
        """The IPv4 address of a host's card."""
        return f"{NETWORKS[card]}.{10 + self.names.index(name)}"

    def run(self, name: str, words: Sequence[str | Path], *, env: Mapping[str, str] | None = None,
            folder: Path | None = None, timeout: float = 60,
            stdin: str = "") -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Runs a command on a host to its end, output and errors together as text."""
        process = self.start(
            name, words, env=env, folder=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired as late:
            self.kill(process)
            said, _ = process.communicate()
            raise AssertionError(f"{name}: {words} took more than {timeout} s and said:\n{said[-4000:]}") from late
        return subprocess.CompletedProcess([str(word) for word in words], process.returncode, said)

    def start(self, name: str, words: Sequence[str | Path], *, env: Mapping[str, str] | None = None,
              folder: Path | None = None, **popen: Any) -> subprocess.Popen[Any]:  # fmt: skip
        """Starts a command on a host in a session of its own; `command_pid` tells which process it is."""
        if name not in self._inits:
            raise AssertionError(f"host {name} is gone: restore it first")
        enter = ["nsenter", f"--target={self._init_pid(name)}", "--net", "--pid", "--mount", "--uts",
                 f"--wdns={folder or self.folder}", "--"]  # fmt: skip
        return subprocess.Popen(
            [*enter, *map(str, words)],
            env={**self.login_environment(), **(env or {})},
            start_new_session=True,
            **popen,
        )

    def login_environment(self) -> dict[str, str]:
        """What a shell on any host begins with."""
        path = ":".join([*map(str, self.path), SYSTEM_PATH])
        return {"HOME": str(self.folder), "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8", "PATH": path,
                **self.environment}  # fmt: skip

    def is_reachable(self, name: str) -> bool:
        """Whether the host runs and its links are up."""
        return name in self._inits and name not in self._cut

    def cut(self, name: str) -> None:
        """Takes both links of a host down; its processes go on. Nobody is told: packets are lost."""
        self._cut.add(name)
        self._set_links(name, "down")

    def heal(self, name: str) -> None:
        """Brings the links of a host up again."""
        self._set_links(name, "up")
        self._cut.discard(name)

    def remove(self, name: str) -> None:
        """The host is gone, as after a power failure: links first, so that nobody is told, then all its processes."""
        self.cut(name)
        self._end(name)

    def restore(self, name: str) -> None:
        """A host that was removed comes back empty, without the daemons it had."""
        if name not in self._inits:
            self._start(name)
        self.heal(name)

    def processes(self, name: str) -> list[Process]:
        """What runs on a host beside its first process and the daemons. Empty for a host that is gone."""
        if name not in self._inits:
            return []
        init = self._init_pid(name)
        space = pid_namespace(init)
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid != init and pid_namespace(pid) == space:
                process = read_process(pid)
                if process is not None and process.name not in DAEMONS and process.words[:2] != ("sleep", "3600"):
                    found.append(process)
        return found

    def left(self, names: Iterable[str] | None = None, *, within: float = 0) -> dict[str, list[Process]]:
        """The hosts on which something still runs after at most `within` seconds, zombies aside; empty is good."""
        until = time.monotonic() + within
        while True:
            found = {
                name: running
                for name in names or self.names
                if (running := [process for process in self.processes(name) if process.state != "Z"])
            }
            if not found or time.monotonic() >= until:
                return found
            time.sleep(0.1)

    def clear(self) -> None:
        """Kills what `left` finds, so that a test which failed leaves nothing to the next."""
        for running in self.left().values():
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def command_pid(self, process: subprocess.Popen[Any]) -> int:
        """The number, outside, of the command that `start` brought to a host."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            started = children(process.pid)
            if started and read_process(started[0]) is not None:
                return started[0]
            time.sleep(0.01)
        raise AssertionError(f"process {process.pid} has started nothing on its host; exit code {process.poll()}")

    def kill(self, process: subprocess.Popen[Any]) -> None:
        """Ends a command that `start` began, but not what the command itself has started."""
        for pid in [*children(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def _build_network(self) -> None:
        hub = f"{self._prefix}-hub"
        _ip("netns", "add", hub)
        for card in NETWORKS:
            _ip("-n", hub, "link", "add", f"to-{card}", "type", "bridge")
            _ip("-n", hub, "link", "set", f"to-{card}", "up")
        for name in self.names:
            space = self._space(name)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            for card in NETWORKS:
                port = f"{card}-{name}"
                _ip("-n", space, "link", "add", card, "type", "veth", "peer", "name", port)
                _ip("-n", space, "link", "set", port, "netns", hub)
                _ip("-n", hub, "link", "set", port, "master", f"to-{card}", "up")
                _ip("-n", space, "addr", "add", f"{self.address(name, card)}/24", "dev", card)
                _ip("-n", space, "link", "set", card, "up")

    def _start(self, name: str) -> None:
        # The host ends with the process that made it, however that ends.
        words = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={_NAMESPACES / self._space(name)}",
                 "unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts",
                 "bash", "-c", _INIT, "init", str(self.folder / "hosts"), name]  # fmt: skip
        init = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                start_new_session=True,
                                env=self.login_environment(), text=True)  # fmt: skip
        assert init.stdout is not None
        if init.stdout.readline() != "up\n":
            init.kill()
            init.wait()
            raise AssertionError(f"host {name} did not start")
        self._inits[name] = init

    def _end(self, name: str) -> None:
        init = self._inits.pop(name)
        init.kill()
        init.wait()
        if init.stdout is not None:
            init.stdout.close()

    def _init_pid(self, name: str) -> int:
        return children(self._inits[name].pid)[0]

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _set_links(self, name: str, state: str) -> None:
        for card in NETWORKS:
            _ip("-n", f"{self._prefix}-hub", "link", "set", f"{card}-{name}", state)


def why_not() -> str | None:
    """Why this machine cannot have such hosts; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts made of namespaces need root on Linux"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "sh", "-c",
         "mount --make-rprivate / && mount -t proc proc /proc && hostname ru-try"],
        capture_output=True, text=True,
    )  # fmt: skip
    if tried.returncode != 0:
        return f"this machine lets root make no namespaces: {tried.stderr.strip()}"
    return None


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _delete_namespaces(prefix: str) -> None:
    for path in _NAMESPACES.glob(f"{prefix}*"):
        subprocess.run(["ip", "netns", "del", path.name], capture_output=True)


def _remove_leftovers() -> None:
    for path in _NAMESPACES.glob("ru-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _delete_namespaces(path.name)
