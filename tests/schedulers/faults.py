"""Faults of a job with two ranks on each of two hosts, and what becomes of it under a launcher.

The job is `programs/loop.py`, whose collectives wait for an hour, so what ends it is the launcher or nobody. The
victim is rank 3, the second one of h2, or h2 itself; launchers run on h1.
"""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.schedulers.cluster import PROGRAMS, launch_words
from tests.schedulers.hosts import Hosts

FIRST, SECOND = "h1", "h2"
PER_HOST, VICTIM = 2, 3
STEP = 12
"""The step before which the fault comes; the last checkpoint is of step 10."""
STEPS = 25
STALL, GRACE = 6.0, 2.0
"""Seconds: the limits that ours is given here."""


# The launchers of a job, by the host that each runs on.
Launched = Mapping[str, subprocess.Popen[bytes]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    name: str
    title: str
    inside: str | None = None
    """What the victim does by itself, a word of loop.py."""
    strike: Callable[[Hosts], None] | None = None
    """What the driver does to the victim's host."""
    blames_rank: bool = True
    """Whether one rank is to blame; else it is the host."""


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(name="exit_7", title="a rank exits with 7", inside="exit:7"),
        Fault(name="kill", title="a rank is killed", inside="kill"),
        Fault(name="stop", title="a rank is stopped (SIGSTOP)", inside="stop"),
        Fault(name="cut", title="the link of a host is cut", strike=lambda hosts: hosts.cut(SECOND), blames_rank=False),
        Fault(name="gone", title="a host is gone", strike=lambda hosts: hosts.remove(SECOND), blames_rank=False),
        Fault(name="exit_0", title="a rank exits 0 early", inside="exit:0"),
        Fault(name="hang", title="a rank stays out of a collective", inside="hang"),
    )
}


def undisturbed_losses(world: int, steps: int) -> dict[int, str]:
    """What loop.py prints when nothing happens to it, worked out without it."""
    state, losses = 1.0, {}
    for step in range(1, steps + 1):
        state = 0.9 * state + 0.1 * sum((rank + 1) * step % 7 for rank in range(world)) / world
        losses[step] = f"{state:.12f}"
    return losses


def losses_in(folder: Path) -> dict[int, str]:
    """The loss of each step that loop.py has printed; a step that was done twice must have had one loss."""
    losses: dict[int, str] = {}
    path = folder / "losses"
    for line in path.read_text().splitlines() if path.exists() else []:
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step}: {losses[int(step)]}, then {loss}"
    return losses


@dataclass
class Job:
    """A job that runs: its launchers, by host, and its folder."""

    folder: Path
    launchers: Launched
    log: Path

    @property
    def losses(self) -> dict[int, str]:
        """The loss of each step so far."""
        return losses_in(self.folder)

    @property
    def reports(self) -> list[dict[str, Any]]:
        """What the guard has said of each attempt."""
        path = self.folder / "report"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self) -> str:
        """What launchers and ranks have printed."""
        return self.log.read_text(errors="replace")

    def wait(self, hosts: Hosts, seconds: float) -> float | None:
        """The time (Unix) at which the launchers on all reachable hosts had ended; None when they have not in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if all(
                launcher.poll() is not None for name, launcher in self.launchers.items() if hosts.is_reachable(name)
            ):
                return time.time()
            time.sleep(0.02)
        return None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job after a fault."""

    fault: str
    launcher: str
    seconds: float | None
    """From the fault to the end of the launcher; None when it was still there at the cap."""
    code: int | None
    """The exit code of the launcher on the first host."""
    left: int
    """Processes of the job on reachable hosts, two seconds after the end or at the cap."""
    verdict: Mapping[str, Any] = field(default_factory=dict)
    """What the guard said; empty without one."""


def start_ours(hosts: Hosts, folder: Path, words: Sequence[str], options: Sequence[str] = (),
               nodes: Sequence[str] = (FIRST, SECOND)) -> Launched:  # fmt: skip
    """The job by `megatron-ru launch mpirun`, under its guard."""
    (folder / "hostfile").write_text("".join(f"{name}\n" for name in nodes))
    given = launch_words(
        "mpirun", "--nodes", "2", "--gpus-per-node", str(PER_HOST), "--hostfile", folder / "hostfile",
        "--stall", f"{STALL:g}", "--grace", f"{GRACE:g}", *options, command=words,
    )  # fmt: skip
    return {FIRST: _start(hosts, FIRST, given, folder, {"RU_GUARD_REPORT": str(folder / "report")})}


def start_mpirun(hosts: Hosts, folder: Path, words: Sequence[str]) -> Launched:
    """The job by nothing but mpirun."""
    (folder / "hostfile").write_text(f"{FIRST} slots={PER_HOST}\n{SECOND} slots={PER_HOST}\n")
    ranks = 'export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE; exec "$@"'
    travels = [word for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", *_meeting(hosts)) for word in ("-x", name)]
    given = ["mpirun", "-np", str(2 * PER_HOST), "-npernode", str(PER_HOST), "-hostfile", str(folder / "hostfile"),
             "--bind-to", "none", *travels, "bash", "-c", ranks, "rank", *words]  # fmt: skip
    return {FIRST: _start(hosts, FIRST, given, folder, _meeting(hosts))}


def start_torchrun(hosts: Hosts, folder: Path, words: Sequence[str]) -> Launched:
    """The job by nothing but torchrun, one on each host."""
    meeting = _meeting(hosts)
    return {
        name: _start(
            hosts, name,
            ["torchrun", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(PER_HOST), "--master-addr",
             meeting["MASTER_ADDR"], "--master-port", meeting["MASTER_PORT"], "--no-python", *words],
            folder, {},
        )
        for node, name in enumerate((FIRST, SECOND))
    }  # fmt: skip


LAUNCHERS = {"ours": start_ours, "mpirun": start_mpirun, "torchrun": start_torchrun}


@contextmanager
def started(hosts: Hosts, folder: Path, start: Callable[..., Launched], fault: Fault | None, steps: int = STEPS,
            **more: Any) -> Iterator[Job]:  # fmt: skip
    """The job from its start; at the end all that is left of it is killed, and the hosts are as before."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["python", str(PROGRAMS / "loop.py"), str(folder), str(steps)]
    if fault is not None and fault.inside is not None:
        words += [fault.inside, str(VICTIM), str(STEP)]
    job = Job(folder, start(hosts, folder, words, **more), folder / "log")
    try:
        yield job
    finally:
        for name in (FIRST, SECOND):
            if not hosts.is_reachable(name):
                hosts.restore(name)
        hosts.clear()
        for launcher in job.launchers.values():
            launcher.wait()


def struck(hosts: Hosts, job: Job, fault: Fault, seconds: float = 90) -> float:
    """The time (Unix) at which the fault came; it is brought about where that is the driver's business."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and job.launchers[FIRST].poll() is None:
        if fault.strike is not None and len(job.losses) >= STEP - 1:
            now = time.time()
            fault.strike(hosts)
            return now
        told = job.folder / "fault"
        if fault.inside is not None and told.exists() and (written := told.read_text()).endswith("\n"):
            return float(written)
        time.sleep(0.02)
    if fault.inside is not None and (told := job.folder / "fault").exists():
        return float(told.read_text())
    raise AssertionError(f"the job never came to step {STEP}:\n{job.output()[-4000:]}")


def measure(hosts: Hosts, folder: Path, launcher: str, fault: Fault, cap: float) -> Outcome:
    """What becomes of the job, watched for at most `cap` seconds after the fault."""
    with started(hosts, folder, LAUNCHERS[launcher], fault) as job:
        at = struck(hosts, job, fault)
        ended = job.wait(hosts, cap - (time.time() - at))
        reachable = [name for name in hosts.names if hosts.is_reachable(name)]
        left = hosts.left(reachable, within=0 if ended is None else 2)
        return Outcome(
            fault=fault.name,
            launcher=launcher,
            seconds=None if ended is None else ended - at,
            code=None if ended is None else _exit_code(job.launchers[FIRST]),
            left=sum(map(len, left.values())),
            verdict=job.reports[-1] if job.reports else {},
        )


def _meeting(hosts: Hosts) -> dict[str, str]:
    return {"MASTER_ADDR": hosts.address(FIRST), "MASTER_PORT": "23456"}


def _start(
    hosts: Hosts, name: str, words: Sequence[str], folder: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return hosts.start(name, words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _exit_code(launcher: subprocess.Popen[bytes]) -> int:
    code = launcher.wait()
    return 128 - code if code < 0 else code


def name_of_code(code: int | None) -> str:
    """`137 (KILL)`, `7`, `-`."""
    if code is None:
        return "-"
    if code > 128:
        try:
            return f"{code} ({signal.Signals(code - 128).name.removeprefix('SIG')})"
        except ValueError:
            return str(code)
    return str(code)
