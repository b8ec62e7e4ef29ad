"""What all clusters have in common: the environment of a user, and jobs sent by `megatron-ru launch`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.schedulers.hosts import Hosts

LOGIN = "h0"
PROGRAMS = Path(__file__).with_name("programs")
_PROJECT = Path(__file__).parents[2]
# Open MPI refuses root unless it is told twice.
ROOT_MAY_MPIRUN = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                   "PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # fmt: skip


def make_environment(folder: Path) -> Path:
    """A folder like a virtual environment with this interpreter's python, torchrun and megatron-ru, and no mpirun."""
    bin = folder / "environment" / "bin"
    bin.mkdir(parents=True)
    here = Path(sys.executable).parent
    for name in ("python", "python3", "torchrun", "megatron-ru"):
        # Not a link: an interpreter finds its packages by the place it lies in.
        program = bin / name
        program.write_text(f'#!/bin/bash\nexec "{here / name}" "$@"\n')
        program.chmod(0o755)
    (bin / "activate").write_text(f'export VIRTUAL_ENV="{bin.parent}" PATH="{bin}:$PATH"\n')
    return bin.parent


def launch_words(
    target: str, *options: str | Path, command: Sequence[str | Path], action: str = "--submit"
) -> list[str]:
    """`megatron-ru launch TARGET OPTIONS --submit -- COMMAND`."""
    return ["megatron-ru", "launch", target, *map(str, options), action, "--", *map(str, command)]


def launch(hosts: Hosts, target: str, *options: str | Path, command: Sequence[str | Path], action: str = "--submit",
           host: str = LOGIN, env: Mapping[str, str] | None = None, folder: Path | None = None,
           timeout: float = 120) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """What `megatron-ru launch` on a host ends with."""
    words = launch_words(target, *options, command=command, action=action)
    return hosts.run(host, words, env=env, folder=folder, timeout=timeout)


def show_rank(record: Path, *more: str) -> list[str | Path]:
    """A command that appends what its rank sees of the world to `record`."""
    return ["/usr/bin/python3", "-ISE", PROGRAMS / "show_rank.py", record, *more]


def ranks_seen(record: Path, *, by_rank: bool = True) -> list[dict[str, Any]]:
    """What the ranks wrote, in the order of RANK, else in that of time."""
    lines = record.read_text().splitlines() if record.exists() else []
    seen = [json.loads(line) for line in lines]
    return sorted(seen, key=lambda rank: int(rank["RANK"])) if by_rank else seen


def wait_for_lines(record: Path, count: int, log: Callable[[], str], seconds: float = 60) -> None:
    """Returns once `record` has so many lines; `log` is shown when it never has."""
    until = time.monotonic() + seconds
    while not record.exists() or record.read_text().count("\n") < count:
        if time.monotonic() >= until:
            raise AssertionError(f"{record.name} has no {count} lines after {seconds} s:\n{log()[-4000:]}")
        time.sleep(0.1)


def assert_world(record: Path, hosts: Hosts, names: Sequence[str], per_host: int, *, master: str | None = None) -> None:
    """Fails unless every rank of `names` x `per_host` ran once, knew its place, and all knew one meeting place."""
    seen = ranks_seen(record)
    world = len(names) * per_host
    assert [rank["RANK"] for rank in seen] == [str(rank) for rank in range(world)], seen
    assert [rank["LOCAL_RANK"] for rank in seen] == [str(rank % per_host) for rank in range(world)]
    assert {rank["WORLD_SIZE"] for rank in seen} == {str(world)}
    assert {rank["LOCAL_WORLD_SIZE"] for rank in seen} == {str(per_host)}
    assert sorted({rank["host"] for rank in seen}) == sorted(names)
    for first in range(0, world, per_host):
        assert len({rank["host"] for rank in seen[first : first + per_host]}) == 1, "a node's ranks are neighbours"
    assert {rank["MASTER_ADDR"] for rank in seen} == {master or hosts.address(seen[0]["host"])}
    ports = {rank["MASTER_PORT"] for rank in seen}
    assert len(ports) == 1
    assert 10000 <= int(ports.pop()) <= 29999


def user_environment() -> dict[str, str]:
    """Variables of the user on every host."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_PROJECT), "PYTHONUNBUFFERED": "1", **ROOT_MAY_MPIRUN}
