"""A Grid Engine of its own with the resources of ABCI 2.0: master and login on h0, nodes h1 and h2."""

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.schedulers import grid_engine_site as site
from tests.schedulers.cluster import LOGIN, ROOT_MAY_MPIRUN, launch
from tests.schedulers.hosts import Hosts

NODES = ("h1", "h2")
# Where the port formula of the published script gives ports that outgoing connections use.
FIRST_JOB = 35000
_PROGRAMS = Path("/usr/lib/gridengine")
# Nodes of a kind: queue, parallel environment, slots of a host.
_KINDS = (("v", "v_node", 4), ("a", "a_node", 8))


class GridEngineCluster:
    """The cluster; use it as a context. Its daemons end with their hosts, or with the context."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts = hosts
        self.folder = folder
        self.environment = {
            "SGE_ROOT": str(folder), "SGE_CELL": "default", "SGE_ARCH": "lx-amd64", "SGE_CLUSTER_NAME": "ru",
            "SGE_QMASTER_PORT": "16444", "SGE_EXECD_PORT": "16445",
        }  # fmt: skip
        """What every user of this Grid Engine has set, on top of what a host gives."""

    def __enter__(self) -> "GridEngineCluster":
        self._write_files()
        self._program(LOGIN, "sge_qmaster")
        self._wait_for("the master", lambda: self._try("qconf", "-sh") == 0)
        self._configure()
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()
        return self

    def __exit__(self, *_: object) -> None:
        self.hosts.run(LOGIN, ["qdel", "-f", "-u", "*"], env=self.environment)
        for host in (*NODES, LOGIN):
            if self.hosts.is_reachable(host):
                self.hosts.run(host, ["bash", "-c", f"kill $(cat {self.folder}/pids/{host})"])

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node, at first and after its host was restored."""
        self._program(node, "sge_execd")

    def wait_until_idle(self) -> None:
        """Returns when all nodes wait for work and no job is left."""
        self._wait_for(
            "idle nodes", lambda: not self.ask("qstat", "-u", "*").strip() and self._free_queues() == 2 * len(NODES)
        )

    def clear(self) -> None:
        """Deletes all jobs and waits for idle nodes."""
        self.hosts.run(LOGIN, ["qdel", "-u", "*"], env=self.environment)
        self.wait_until_idle()

    def ask(self, *words: str | Path) -> str:
        """What a command of Grid Engine says on the login host; it must succeed."""
        done = self.hosts.run(LOGIN, words, env=self.environment)
        assert done.returncode == 0, f"{words}: {done.stdout}"
        return done.stdout

    def launch(self, *options: str | Path, command: Sequence[str | Path], action: str = "--submit", nodes: int = 2,
               target: str = "abci-v") -> subprocess.CompletedProcess[str]:  # fmt: skip
        """`megatron-ru launch abci-v` on the login host; output goes to the cluster's folder."""
        words: list[str | Path] = ["--nodes", str(nodes), "--group", site.PROJECT, "--output", self.folder / "output",
                 "--virtual-environment", self.hosts.folder / "environment"]  # fmt: skip
        if "--time" not in options:
            words += ["--time", "00:05:00"]
        return launch(self.hosts, target, *words, *options, command=command, action=action, folder=self.folder,
                      env=self.environment)  # fmt: skip

    def submit(
        self, *options: str | Path, command: Sequence[str | Path], nodes: int = 2, target: str = "abci-v"
    ) -> str:
        """The id of a job that `megatron-ru launch abci-v --submit` sent off."""
        sent = self.launch(*options, command=command, nodes=nodes, target=target)
        assert re.fullmatch(r"\d+\n", sent.stdout), sent.stdout
        return sent.stdout.strip()

    def state(self, job: str) -> str:
        """The letters of qstat: r, qw, hqw, dr, Rq …; empty once the job has ended."""
        lines = [line.split() for line in self.ask("qstat", "-u", "*").splitlines()]
        states = [words[4] for words in lines if words and words[0] == job]
        return states[0] if states else ""

    def wait(self, job: str, *states: str, seconds: float = 90) -> str:
        """The state of a job once it is one of `states`, by default the end."""
        wanted = states or ("",)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state = self.state(job)
            if state in wanted:
                return state
            time.sleep(0.2)
        raise AssertionError(
            f"after {seconds} s job {job} is {self.state(job)!r}, not {wanted}:\n{self.output(job)[-4000:]}"
        )

    def accounting(self, job: str) -> list[Mapping[str, str]]:
        """What `qacct` knows of each time that the job, or a task of it, ran: exit_status, failed, taskid …"""
        text = ""
        until = time.monotonic() + 15
        while "exit_status" not in text and time.monotonic() < until:
            text = self.hosts.run(LOGIN, ["qacct", "-j", job], env=self.environment).stdout
            time.sleep(0.2)
        runs = [run for run in re.split(r"={20,}\n", text) if "exit_status" in run]
        return [dict(line.split(maxsplit=1) for line in run.splitlines() if len(line.split()) > 1) for run in runs]

    def exit_code(self, job: str) -> int:
        """The exit code of the job's last run."""
        runs = self.accounting(job)
        assert runs, f"qacct knows nothing of job {job}"
        # Behind the code of a killed job stands a word.
        return int(runs[-1]["exit_status"].split()[0])

    def output(self, job: str) -> str:
        """What the job has printed, all its tasks together."""
        files = sorted((self.folder / "output").glob(f"*.o{job}*"))
        return "".join(file.read_text(errors="replace") for file in files)

    def _free_queues(self) -> int:
        lines = self.ask("qstat", "-f").splitlines()
        # A queue in trouble has a sixth word, its state.
        return sum(line.startswith(("v@", "a@")) and len(line.split()) == 5 for line in lines)

    def _wait_for(self, what: str, done: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() >= until:
                raise AssertionError(f"after {seconds} s no {what}: {self.ask('qstat', '-f', '-u', '*')}")
            time.sleep(0.2)

    def _try(self, *words: str) -> int:
        return self.hosts.run(LOGIN, words, env=self.environment).returncode

    def _program(self, host: str, name: str) -> None:
        # Both make a daemon of themselves. Their pid files are in folders that other hosts use as well.
        remember = f'{_PROGRAMS / name} && pgrep -x {name} >"{self.folder}/pids/{host}"'
        done = self.hosts.run(host, ["bash", "-c", remember], env=self.environment)
        assert done.returncode == 0, f"{name} on {host}: {done.stdout}"

    def _write_files(self) -> None:
        for name in ("bin", "utilbin", "lib", "default/common", "spool/qmaster/job_scripts", "spool/execd", "pids",
                     "output", "site", *(f"tmp/{node}" for node in NODES)):  # fmt: skip
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "utilbin", "lib"):
            (self.folder / name / "lx-amd64").symlink_to(_PROGRAMS)
        (self.folder / "util").symlink_to("/usr/share/gridengine/util")
        common = self.folder / "default" / "common"
        (common / "bootstrap").write_text(site.BOOTSTRAP.format(folder=self.folder).lstrip())
        (self.folder / "spool" / "qmaster" / "jobseqnum").write_text(f"{FIRST_JOB}\n")
        # The verifier runs in qsub, before the master sees the job: only so does `-w v` judge what it made of it.
        (common / "sge_request").write_text(f"-jsv {self.folder}/jsv.sh\n")
        (common / "act_qmaster").write_text(f"{LOGIN}\n")
        exports = " ".join(f"{name}={value}" for name, value in {**ROOT_MAY_MPIRUN, **self.environment}.items())
        starter = site.STARTER.replace("{exports}", exports).replace("{path}", str(self.folder / "site"))
        wrapper = self.folder / "site" / "qsub"
        for path, text in (
            (self.folder / "jsv.sh", site.JSV),
            (self.folder / "starter.sh", starter),
            (wrapper, site.QSUB),
        ):
            path.write_text(text)
            path.chmod(0o755)
        self.environment["PATH"] = f"{wrapper.parent}:{self.hosts.login_environment()['PATH']}"
        settings = Path("/usr/share/gridengine/default-configuration").read_text()
        spool = f"{common};{self.folder}/spool/qmaster"
        for words in (
            [_PROGRAMS / "spoolinit", "classic", "libspoolc", spool, "init"],
            [
                _PROGRAMS / "spooldefaults",
                "configuration",
                self._file("global", _changed(settings, site.CLUSTER_SETTINGS)),
            ],
            [_PROGRAMS / "spooldefaults", "complexes", "/usr/share/gridengine/util/resources/centry"],
            [_PROGRAMS / "spooldefaults", "usersets", "/usr/share/gridengine/util/resources/usersets"],
            [_PROGRAMS / "spooldefaults", "managers", "root"],
        ):
            self.ask(*words)

    def _configure(self) -> None:
        for node in (*NODES, LOGIN):
            self._qconf("-ah", node, may_fail=True)
        self._qconf("-Mc", self._file("complexes", self.ask("qconf", "-sc") + site.COMPLEXES))
        project = f"name {site.PROJECT}\noticket 0\nfshare 0\nacl NONE\nxacl NONE\n"
        self._qconf("-Aprj", self._file("project", project))
        self._qconf("-Ahgrp", self._file("group", f"group_name @nodes\nhostlist {' '.join(NODES)}\n"))
        for queue, environment, slots in _KINDS:
            text = site.PARALLEL_ENVIRONMENT.format(name=environment, slots=slots)
            self._qconf("-Ap", self._file(environment, text))
            self._qconf("-Aq", self._file(queue, self._queue(queue, environment, slots)))
        self._qconf("-Msconf", self._file("scheduler", _changed(self.ask("qconf", "-ssconf"), site.SCHEDULER_SETTINGS)))
        for node in (*NODES, LOGIN):
            self._qconf("-as", node)

    def _queue(self, name: str, environment: str, slots: int) -> str:
        # Hosts share their files here, and a job's temporary folder has one name on all of them.
        tmpdir = ",".join([f"{self.folder}/tmp", *(f"[{node}={self.folder}/tmp/{node}]" for node in NODES)])
        return site.QUEUE.format(
            name=name, hosts="@nodes", environment=environment, slots=slots, folder=self.folder, tmpdir=tmpdir
        )

    def _qconf(self, *words: str | Path, may_fail: bool = False) -> None:
        done = self.hosts.run(LOGIN, ["qconf", *words], env=self.environment)
        assert may_fail or done.returncode == 0, f"qconf {words}: {done.stdout}"

    def _file(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.settings"
        path.write_text(text.replace("{folder}", str(self.folder)).lstrip())
        return path


def _changed(settings: str, changes: Mapping[str, str]) -> str:
    """Settings, a name and a value to a line, with some of the values changed and the missing ones added."""
    kept = [line for line in settings.splitlines() if not line.split() or line.split()[0] not in changes]
    return "\n".join([*kept, *(f"{name} {value}" for name, value in changes.items()), ""])
