"""Who am I among the processes of this run, read from the environment.

Sources, in this order; the first launcher found is the one that started this process:

1. torch's own RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (LOCAL_SIZE is read in its place, as DeepSpeed's
   launcher writes it), MASTER_ADDR, MASTER_PORT. What is set here stays as it is.
2. Open MPI: OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}.
3. MVAPICH2: MV2_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}.
4. PMI (MPICH, Intel MPI, Cray): PMI_RANK, PMI_SIZE, MPI_LOCALRANKID or PMI_LOCAL_RANK, MPI_LOCALNRANKS or
   PMI_LOCAL_SIZE.
5. PMIx: PMIX_RANK. PMIx publishes no size through the environment, so it comes after PMI.
6. Slurm, for a process that srun started: SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS, SLURM_LOCALID,
   SLURM_STEP_TASKS_PER_NODE, the first host of SLURM_STEP_NODELIST, a port made of SLURM_JOB_ID.
7. Nothing: one process, 127.0.0.1 and a free port.

What follows from the order:

- A launcher inside another one hides it. Slurm's variables beside Open MPI's describe the batch step, or the
  srun that brought mpirun's daemon to this host; they are neither used nor compared.
- torchrun inside srun or mpirun (TORCHELASTIC_RUN_ID is set) hides both. So does any launcher that gave a
  complete torch set with k processes per outer task: WORLD_SIZE = k * outer size and RANK // k = outer rank.
- In an sbatch script or a salloc shell SLURM_NTASKS is that of the allocation and SLURM_PROCID is 0 for
  everybody. Only a numbered step (SLURM_STEP_ID) says that srun started the process; without it a plain
  `python` is one process, whatever SLURM_NTASKS says.
- `srun --mpi=pmix` and `--mpi=pmi2` set a PMI rank without sizes; the step that agrees with it fills them in.
- Torch variables beside a launcher are compared with it one by one, since a forgotten `export RANK=3` would
  otherwise make two processes with one rank. MASTER_ADDR and MASTER_PORT are compared with nothing.
- An empty variable counts as unset: that is what `-x NAME` makes of an unset one.

Imported inside `import torch` through an entry point: the standard library only, and UserError alone raised.
"""

import os
import random
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.slurm_lists import expand_hosts, task_counts

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """The six values that `torch.distributed` and Megatron read, and where they came from."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    source: str
    "torchrun, torch variables, Open MPI, MVAPICH2, PMI, PMIx, Slurm or single process"

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Sets those of the six variables that are missing or empty; the others stay as they are."""
        for name, value in (
            ("RANK", self.rank),
            ("WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank),
            ("LOCAL_WORLD_SIZE", self.local_world_size),
            ("MASTER_ADDR", self.master_address),
            ("MASTER_PORT", self.master_port),
        ):
            if not environ.get(name):
                environ[name] = str(value)


@dataclass(frozen=True, kw_only=True)
class LaunchedRanks:
    """What the variables say before an address is known; a number nobody gave is None."""

    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None
    source: str
    launcher: str | None
    "the launcher that started this process itself, None under torchrun and alone"
    by_srun: bool = False
    "whether that launcher is srun, alone or as PMI or PMIx"
    names: Mapping[str, str] = field(default_factory=dict)
    "for each known number, the variable that gave it"

    @property
    def on_one_host(self) -> bool:
        return self.local_world_size is not None and self.local_world_size == self.world_size


def apply_rank_environment(environ: MutableMapping[str, str] = os.environ) -> RankEnvironment:
    """The rank environment, its missing variables set in `environ`. Raises what `rank_environment` raises."""
    ranks = rank_environment(environ)
    ranks.export(environ)
    return ranks


def rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """The rank environment of this process; `environ` is only read.

    Raises UserError for a value that is no number or out of range, a partial set, values of two sources that
    contradict, and a run over several hosts whose address nobody gave.
    """
    ranks = launched_ranks(environ)
    rank, world_size, local_rank, local_world_size = _complete(ranks, environ)
    _check_ranges(rank, world_size, local_rank, local_world_size, ranks.names)
    address, port = _master(ranks, world_size, environ)
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_address=address,
        master_port=port,
        source=ranks.source,
    )


def launched_ranks(environ: Mapping[str, str]) -> LaunchedRanks:
    """The numbers that torch's variables and the launcher give together.

    Raises UserError where they contradict or are no numbers.
    """
    own = _read(environ, _TORCH_NAMES)
    if environ.get("TORCHELASTIC_RUN_ID"):
        return _ranks(own, source="torchrun", launcher=None)
    found = _launcher(environ)
    if found is None:
        return _ranks(own, source="torch variables" if own else "single process", launcher=None)
    launcher, given, by_srun = found
    if _nested(own, given):
        return _ranks(own, source="torch variables", launcher=None)
    for variable, (name, value) in own.items():
        if variable in given and given[variable][1] != value:
            other_name, other = given[variable]
            raise UserError(
                f"{name}={value} contradicts {other_name}={other}, which {launcher} gave this process: "
                f"unset {name}, or start the run without {launcher}"
            )
    return _ranks({**given, **own}, source=launcher, launcher=launcher, by_srun=by_srun)


def free_port() -> int:
    """A TCP port on which nothing listens now, from 10000 to 29999.

    The kernel's own choice (port 0) comes from the ephemeral range, where an outgoing connection may take it
    between this call and the listening.
    """
    for _ in range(200):
        port = _FIRST_PORT + random.SystemRandom().randrange(_PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(
        f"no free TCP port between {_FIRST_PORT} and {_FIRST_PORT + _PORTS - 1} was found in 200 tries: "
        "export MASTER_PORT"
    )


def job_port(job: str) -> int:
    """10000 + job id mod 20000, below Linux's ephemeral ports; an id with letters counts by its checksum."""
    number = int(job) if job.isascii() and job.isdigit() else zlib.crc32(job.encode())
    return _FIRST_PORT + number % _PORTS


# Torch's variable, and the names under which each launcher writes that number.
_Names = Mapping[str, tuple[str, ...]]
# Torch's variable, and who said which number.
_Readings = dict[str, tuple[str, int]]

_FIRST_PORT, _PORTS = 10000, 20000

_TORCH_NAMES: _Names = {
    "RANK": ("RANK",),
    "WORLD_SIZE": ("WORLD_SIZE",),
    "LOCAL_RANK": ("LOCAL_RANK",),
    "LOCAL_WORLD_SIZE": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
}


def _comm_world(prefix: str) -> _Names:
    tails = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {variable: (f"{prefix}_COMM_WORLD_{tail}",) for variable, tail in zip(RANK_VARIABLES, tails, strict=True)}


_MPI_LAUNCHERS: tuple[tuple[str, _Names], ...] = (
    ("Open MPI", _comm_world("OMPI")),
    ("MVAPICH2", _comm_world("MV2")),
    (
        "PMI",
        {
            "RANK": ("PMI_RANK",),
            "WORLD_SIZE": ("PMI_SIZE",),
            "LOCAL_RANK": ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
            "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        },
    ),
    ("PMIx", {"RANK": ("PMIX_RANK",)}),
)

# Slurm numbers the batch script, the interactive shell and the like from here on; srun's steps count from 0.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def _launcher(environ: Mapping[str, str]) -> tuple[str, _Readings, bool] | None:
    """The launcher that started this process, what it says, and whether it is srun."""
    step = _slurm_step(environ)
    for launcher, names in _MPI_LAUNCHERS:
        given = _read(environ, names)
        if not {"RANK", "WORLD_SIZE"} & given.keys():
            continue
        if launcher == "PMIx" and environ.get("PMIX_NAMESPACE", "").startswith("slurm.") and step is None:
            continue  # The interactive shell of salloc is a PMIx process too.
        if launcher in ("PMI", "PMIx") and step is not None:
            same = {"RANK", "WORLD_SIZE"} & given.keys()
            if all(step[variable][1] == given[variable][1] for variable in same):
                return launcher, {**step, **given}, True
        return launcher, given, False
    return None if step is None else ("Slurm", step, True)


def _slurm_step(environ: Mapping[str, str]) -> _Readings | None:
    """The numbers of the srun step that this process is a task of; None outside of one."""
    step = _number(environ, "SLURM_STEP_ID", "SLURM_STEPID")
    if step is None or step[1] >= _FIRST_SPECIAL_STEP:
        return None
    given = _read(
        environ,
        {
            "RANK": ("SLURM_PROCID",),
            "WORLD_SIZE": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
            "LOCAL_RANK": ("SLURM_LOCALID",),
        },
    )
    if not given.keys() >= {"RANK", "WORLD_SIZE"}:
        return None
    local_size = _slurm_local_size(environ)
    if local_size is not None:
        given["LOCAL_WORLD_SIZE"] = local_size
    return given


def _slurm_local_size(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Tasks of this step on this node: entry SLURM_NODEID of a list like `4(x2),3`."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        written = environ.get(name)
        if not written:
            continue
        counts = task_counts(written)
        node = _number(environ, "SLURM_NODEID")
        if node is not None and node[1] < len(counts):
            return name, counts[node[1]]
        if len(set(counts)) == 1:
            return name, counts[0]
    return None


def _nested(own: _Readings, given: _Readings) -> bool:
    """Whether a complete torch set is that of a launcher which each outer task ran once."""
    if not (own.keys() >= set(RANK_VARIABLES) and given.keys() >= {"RANK", "WORLD_SIZE"}):
        return False
    per_task, rest = divmod(own["WORLD_SIZE"][1], max(given["WORLD_SIZE"][1], 1))
    return rest == 0 and per_task > 1 and own["RANK"][1] // per_task == given["RANK"][1]


def _ranks(readings: _Readings, source: str, launcher: str | None, by_srun: bool = False) -> LaunchedRanks:
    values = {variable: value for variable, (_, value) in readings.items()}
    return LaunchedRanks(
        rank=values.get("RANK"),
        world_size=values.get("WORLD_SIZE"),
        local_rank=values.get("LOCAL_RANK"),
        local_world_size=values.get("LOCAL_WORLD_SIZE"),
        source=source,
        launcher=launcher,
        by_srun=by_srun,
        names={variable: name for variable, (name, _) in readings.items()},
    )


def _complete(ranks: LaunchedRanks, environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    """The four numbers, those that follow from the others added; a UserError names what is missing."""
    rank, world_size = ranks.rank, ranks.world_size
    local_rank, local_world_size = ranks.local_rank, ranks.local_world_size
    if not ranks.names:
        return 0, 1, 0, 1
    if world_size == 1:
        rank = 0 if rank is None else rank
        local_rank = 0 if local_rank is None else local_rank
        local_world_size = 1 if local_world_size is None else local_world_size
    elif environ.get("MASTER_ADDR") in (LOOPBACK, "localhost", "::1"):
        # Nobody reaches another host through the loopback: all processes are here.
        local_rank = rank if local_rank is None else local_rank
        local_world_size = world_size if local_world_size is None else local_world_size
    values = dict(zip(RANK_VARIABLES, (rank, world_size, local_rank, local_world_size), strict=True))
    missing = [name for name, value in values.items() if value is None]
    if rank is None or world_size is None or local_rank is None or local_world_size is None:
        found = ", ".join(f"{name}={values[variable]}" for variable, name in ranks.names.items())
        either = f", or unset {' '.join(ranks.names.values())} to run alone" if ranks.launcher is None else ""
        raise UserError(
            f"{found} without {' and '.join(missing)} does not place this process among the others: "
            f"export {' and '.join(missing)}{either}"
        )
    return rank, world_size, local_rank, local_world_size


def _check_ranges(rank: int, world_size: int, local_rank: int, local_world_size: int, names: Mapping[str, str]) -> None:
    for small, small_value, large, large_value in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
    ):
        if small_value >= large_value:
            small_name, large_name = names.get(small, small), names.get(large, large)
            raise UserError(
                f"{small_name}={small_value} is not below {large_name}={large_value}: ranks count from 0, so "
                f"set {small_name} between 0 and {large_value - 1}, or correct {large_name}"
                if large_value > 0
                else f"{large_name}={large_value} is no number of processes: set it to 1 or more"
            )
    if local_world_size > world_size:
        raise UserError(
            f"{names.get('LOCAL_WORLD_SIZE', 'LOCAL_WORLD_SIZE')}={local_world_size} processes on this host "
            f"are more than {names.get('WORLD_SIZE', 'WORLD_SIZE')}={world_size} in the whole run: "
            "correct one of them"
        )


def _master(ranks: LaunchedRanks, world_size: int, environ: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 listens: as set, else from Slurm, else the loopback of a run on one host."""
    address = environ.get("MASTER_ADDR")
    given_port = _number(environ, "MASTER_PORT")
    port = None if given_port is None else given_port[1]
    if port is not None and not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is no TCP port: set it between 1 and 65535, or unset it")
    if world_size == 1:
        return address or LOOPBACK, port or free_port()
    if address and port:
        return address, port
    lacking = " and ".join(name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value)
    if ranks.launcher is None:
        raise UserError(f"{world_size} processes need one place to meet, but {lacking} is not set: export {lacking}")
    if ranks.by_srun:
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
        if not address:
            address = LOOPBACK if ranks.on_one_host else expand_hosts(hosts)[0] if hosts else None
        if address and (port or job):
            return address, port or job_port(job or "")
    elif ranks.on_one_host:
        return address or LOOPBACK, port or job_port(_job(environ))
    raise UserError(
        f"{world_size} processes of {ranks.launcher} on several hosts need one place to meet, but {lacking} "
        f"is not set: pip install mpi4py, by which rank 0 tells the others, or export {lacking} on every "
        "host (Open MPI: mpirun -x NAME)"
    )


def _job(environ: Mapping[str, str]) -> str:
    """A word that all ranks of one mpirun on this host share and another mpirun does not."""
    for name in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "MPISPAWN_MPIRUN_ID"):
        if environ.get(name):
            return environ[name]
    return str(os.getppid())


def _read(environ: Mapping[str, str], names: _Names) -> _Readings:
    found = {variable: _number(environ, *candidates) for variable, candidates in names.items()}
    return {variable: reading for variable, reading in found.items() if reading is not None}


def _number(environ: Mapping[str, str], *names: str) -> tuple[str, int] | None:
    """The first of `names` that is set, and its value. Raises UserError unless it is a whole number."""
    for name in names:
        written = environ.get(name)
        if written:
            if re.fullmatch(r"\s*\d{1,18}\s*", written, re.ASCII) is None:
                raise UserError(f"{name}={written!r} is not a whole number from 0 on: set it to one, or unset {name}")
            return name, int(written)
    return None
