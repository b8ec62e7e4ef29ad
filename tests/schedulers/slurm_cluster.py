"""A Slurm of its own over two hosts with four GPUs each that are none: controller and login on h0, nodes h1 and h2."""

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.schedulers.cluster import LOGIN, launch
from tests.schedulers.hosts import Hosts

NODES = ("h1", "h2")
ENDED = frozenset(("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY"))
# A GPU has to be a character device; nobody opens these.
_GPU_DEVICES = ("null", "zero", "full", "random")

_CONFIGURATION = """
ClusterName=ru
SlurmctldHost={login}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait=10
MinJobAge=900
SlurmdTimeout=30
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class SlurmCluster:
    """The cluster; use it as a context. Its daemons end with their hosts, or with the context."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts = hosts
        self.folder = folder

    def __enter__(self) -> "SlurmCluster":
        self._write_configuration()
        self.hosts.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._daemon(LOGIN, "munged", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket",
                     f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                     f"--seed-file={self.folder}/munge.seed", "--force")  # fmt: skip
        self._daemon(LOGIN, "slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()
        return self

    def __exit__(self, *_: object) -> None:
        self.hosts.run(LOGIN, ["bash", "-c", "scancel --user=root; sleep 0.5"])
        for host in (*NODES, LOGIN):
            stop = f"for file in {self.folder}/*.pid; do case $file in *{host}.pid) kill $(cat $file);; esac; done"
            login = f"kill $(cat {self.folder}/slurmctld.pid {self.folder}/munged.pid)"
            self.hosts.run(host, ["bash", "-c", login if host == LOGIN else stop])
        del self.hosts.environment["SLURM_CONF"]

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node, at first and after its host was restored."""
        self._daemon(node, "slurmd", "-N", node)

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Returns when all nodes wait for work."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            states = self.ask("sinfo", "--noheader", "--Node", "--format=%t").split()
            if states == ["idle"] * len(NODES):
                return
            time.sleep(0.2)
        raise AssertionError(f"after {seconds} s the nodes are not idle: {self.ask('sinfo', '--Node')}")

    def ask(self, *words: str) -> str:
        """What a command of Slurm says on the login host; it must succeed."""
        done = self.hosts.run(LOGIN, words)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def launch(self, *options: str | Path, command: Sequence[str | Path], action: str = "--submit",
               nodes: int = 2, gpus: int = 4) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """`megatron-ru launch slurm` on the login host; output goes to the cluster's folder."""
        size = ("--nodes", str(nodes), "--gpus-per-node", str(gpus), "--output", self.folder / "output")
        return launch(self.hosts, "slurm", *size, *options, command=command, action=action, folder=self.folder)

    def submit(self, *options: str | Path, command: Sequence[str | Path], nodes: int = 2, gpus: int = 4) -> str:
        """The id of a job that `megatron-ru launch slurm --submit` sent off."""
        sent = self.launch(*options, command=command, nodes=nodes, gpus=gpus)
        assert re.fullmatch(r"\d+\n", sent.stdout), sent.stdout
        return sent.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, ExitCode, Restarts …"""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 90) -> str:
        """The state of a job once it is one of `states`, by default any that a job ends in."""
        wanted = states or ENDED
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state = self.job(job)["JobState"]
            if state in wanted:
                return state
            time.sleep(0.2)
        raise AssertionError(
            f"after {seconds} s job {job} is {self.job(job)}, not {wanted}:\n{self.output(job)[-4000:]}"
        )

    def wait_for_array(self, job: str, seconds: float = 90) -> list[str]:
        """The states of all jobs of an array once each has ended."""
        until = time.monotonic() + seconds
        while True:
            states = re.findall(r"JobState=(\S+)", self.ask("scontrol", "show", "job", job))
            if ENDED.issuperset(states):
                return states
            if time.monotonic() >= until:
                raise AssertionError(f"after {seconds} s the jobs of array {job} are {states}")
            time.sleep(0.2)

    def output(self, job: str) -> str:
        """What the job has printed."""
        file = self.folder / "output" / f"slurm-{job}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def start_now(self, job: str) -> None:
        """Ends the two minutes that Slurm holds a job back after it was requeued.

        Not before the nodes may take it again: they refuse what was signed in the second of its end or before.
        """
        time.sleep(2)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _daemon(self, host: str, *words: str) -> None:
        done = self.hosts.run(host, words)
        assert done.returncode == 0, f"{words[0]} on {host}: {done.stdout}"

    def _write_configuration(self) -> None:
        for name in ("state", "output", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        for place, device in enumerate(_GPU_DEVICES):
            (self.folder / f"gpu{place}").symlink_to(f"/dev/{device}")
        key = self.folder / "munge.key"
        key.write_bytes(bytes(range(128)))
        key.chmod(0o600)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={self.hosts.address(node)} CPUs=8 RealMemory=1000 Gres=gpu:4" for node in NODES
        )
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(folder=self.folder, login=LOGIN, address=self.hosts.address(LOGIN), nodes=nodes)
        )
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
