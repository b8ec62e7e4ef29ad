"""The programs of the schedulers, from Debian's packages: installed where they are missing and root may do so."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

# A file that each package brings.
SLURM = {"/usr/sbin/slurmctld": "slurmctld", "/usr/sbin/slurmd": "slurmd", "/usr/bin/sbatch": "slurm-client",
         "/usr/sbin/munged": "munge"}  # fmt: skip
GRID_ENGINE = {"/usr/lib/gridengine/sge_qmaster": "gridengine-master",
               "/usr/lib/gridengine/sge_execd": "gridengine-exec", "/usr/bin/qsub": "gridengine-client"}  # fmt: skip
OPEN_MPI = {"/usr/bin/mpirun": "openmpi-bin"}
HOSTS = {"/usr/sbin/ip": "iproute2", "/usr/bin/nsenter": "util-linux"}


def why_missing(*wanted: Mapping[str, str]) -> str | None:
    """Installs the packages whose files are missing; why they are still missing, None when all are there."""
    packages = _missing(*wanted)
    if not packages:
        return None
    names = " ".join(packages)
    if os.geteuid() != 0:
        return f"{names} missing, and only root can install them"
    if shutil.which("apt-get") is None:
        return f"{names} missing, and there is no apt-get here"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    said = ""
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else said
    still = _missing(*wanted)
    return f"apt-get did not install {' '.join(still)}: {said or 'it gave no reason'}" if still else None


def _missing(*wanted: Mapping[str, str]) -> list[str]:
    found = {package for files in wanted for file, package in files.items() if not Path(file).exists()}
    return sorted(found)
