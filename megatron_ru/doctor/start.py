"""`megatron-ru doctor --nodes HOSTS`: the same ranks, started here over mpirun and its ssh."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import TARGETS

# How Open MPI 4 and 5 hand options to ssh: a host that is down is told after ten seconds and asks for no password.
_SSH = "-o ConnectTimeout=10 -o BatchMode=yes"
_SSH_VARIABLES = ("OMPI_MCA_plm_rsh_args", "PRTE_MCA_plm_ssh_args")


def hosts_of(nodes: str) -> list[str]:
    """The hosts in a file, or in words like `gpu1,gpu2`, each once. Raises UserError for what is neither."""
    if Path(nodes).is_file():
        lines = Path(nodes).read_text(encoding="utf-8").splitlines()
        words = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    else:
        words = nodes.split(",")
    hosts = list(dict.fromkeys(words))
    for host in hosts:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", host) is None:
            raise UserError(
                f"--nodes {nodes!r} is neither a file nor a list of hosts such as gpu1,gpu2 ({host!r} is no name of a "
                "host): correct it, or say auto inside a launcher"
            )
    if not hosts:
        raise UserError(f"{nodes} names no host: write one to a line")
    return hosts


def job_over(hosts: Sequence[str], hostfile: Path, gpus: int, words: Sequence[str]) -> JobSpec:
    """The doctor as a job: `gpus` ranks on each host, `words` behind `--nodes auto`. It is its own guard."""
    command = (sys.executable, "-m", "megatron_ru", "doctor", "--nodes", "auto", *words)
    return JobSpec(
        target="mpirun",
        command=command,
        nodes=len(hosts),
        gpus_per_node=gpus,
        hostfile=str(hostfile),
        guard=False,
    )


def start_over(hosts: Sequence[str], gpus: int, words: Sequence[str], limit: float) -> int:
    """The exit code of the ranks, whose report is on stdout; 1 when they did not come to an end in time.

    Raises UserError without mpirun.
    """
    environ = environment(os.environ)
    if shutil.which("mpirun", path=environ["PATH"]) is None:
        raise UserError(
            "the doctor goes to other hosts over mpirun, and there is none on PATH: pip install 'megatron-ru[mpi]', or "
            "start `megatron-ru doctor --nodes auto` by another launcher"
        )
    with tempfile.TemporaryDirectory(prefix="megatron-ru-doctor-") as folder:
        hostfile, script = Path(folder) / "hosts", Path(folder) / "job.sh"
        hostfile.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
        script.write_bytes(TARGETS["mpirun"].render(job_over(hosts, hostfile, gpus, words)).content)
        seconds = _whole_seconds(hosts, limit)
        child = subprocess.Popen(["bash", str(script)], env=environ, start_new_session=True)
        try:
            return _code(child.wait(timeout=seconds))
        except subprocess.TimeoutExpired:
            print(
                f"megatron-ru: mpirun over {', '.join(hosts)} did not end within {seconds:.0f} s: try `ssh HOST true` "
                "for each of them",
                file=sys.stderr,
            )
            return 1
        finally:
            _end(child)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """For mpirun: itself, beside this Python where PATH has none; ssh that gives up on a dead host; leave for root."""
    made = {**dict.fromkeys(_SSH_VARIABLES, _SSH), **given}
    made["PATH"] = f"{given.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    if os.geteuid() == 0:
        made |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        made |= {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return made


def _whole_seconds(hosts: Sequence[str], limit: float) -> float:
    """For arrival, packages, clocks, files, inside and the rounds. Ranks watch over themselves; this is for mpirun."""
    return (len(hosts) + 5) * (limit + 5) + 60


def _end(child: subprocess.Popen[bytes]) -> None:
    """TERM, by which mpirun ends its remote ranks; KILL for what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        os.killpg(child.pid, number)
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue


def _code(code: int) -> int:
    return 128 - code if code < 0 else code
