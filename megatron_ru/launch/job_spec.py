"""A job as a value: what runs, on how much of which machine, for how long."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.quoting import check_matches, check_one_line, check_path
from megatron_ru.launch.walltime import walltime_seconds

SIGNALS = ("USR1", "USR2", "TERM", "INT")

# What the script promises to each rank; a value from outside would break the promise.
PROMISED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Bash refuses an assignment to these, drops it, or reads its own script differently after it.
_OF_BASH = frozenset(
    ("BASHOPTS", "BASH_VERSINFO", "DIRSTACK", "EUID", "FUNCNAME", "GROUPS", "IFS", "PPID", "SHELLOPTS", "UID")
)

_NAME = r"[A-Za-z][A-Za-z0-9_.-]{0,62}"
_ACCOUNT = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
_JOB = r"\d+(?:\[\d*\])?(?:[_.][A-Za-z0-9.-]+)?"
# In a header line nothing can be quoted alike for all schedulers; $, : and % mean something to one or another.
_FOLDER = r"[\w./+@=-]+"


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job. Raises UserError, one rule at a time, for values that no target could take."""

    target: str
    """Where the job goes: the name of a renderer."""
    command: tuple[str, ...]
    """The words every rank runs. They reach it exactly as given; no shell reads them."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs of each node, and ranks on it."""
    cpus_per_task: int | None = None
    """CPU cores for each rank (Slurm only; left out, the site decides)."""
    time: str | None = None
    """Time limit: HH:MM:SS, D-HH:MM:SS, or a number with d, h, m or s."""
    name: str = "megatron-ru"
    """Name of the job: a letter, then letters, digits, dots, dashes and underscores, 63 in all."""
    group: str | None = None
    """Who pays: the ABCI group, or the account of Slurm."""
    queue: str | None = None
    """Partition of Slurm or queue of PBS (left out, the site decides)."""
    modules: tuple[str, ...] = ()
    """Environment modules to load, in this order."""
    virtual_environment: str | None = None
    """Folder of a Python environment to activate."""
    container: str | None = None
    """Container image: for pyxis on Slurm, for Singularity elsewhere."""
    mounts: tuple[str, ...] = ()
    """Folders that the container sees, each as HOST:CONTAINER or HOST:CONTAINER:ro."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every rank."""
    output: str = "."
    """Folder for what the job prints."""
    array: str | None = None
    """One job for each number: FIRST-LAST, FIRST-LAST:STEP, with %N behind it at most N at once. The command
    reads its number from RU_ARRAY_INDEX."""
    dependency: str | None = None
    """Start after others: afterok:JOB, afterany:JOB, afternotok:JOB (several: afterok:JOB:JOB), or singleton."""
    requeue: bool = False
    """Whether the scheduler may put the job back into the queue, after a broken node or a preemption."""
    signal: str | None = None
    """Signal to the ranks before the time limit: USR1, USR2, TERM or INT."""
    signal_seconds: int = 300
    """How many seconds before the time limit that signal comes."""
    interfaces: tuple[str, ...] = ()
    """Network interfaces whose first global IPv4 address is the meeting place, best first."""
    hostfile: str | None = None
    """File with a host in each line, for a plain mpirun over several nodes."""
    torchrun: bool = False
    """On Slurm: one torchrun for each node instead of one task for each rank."""
    guard: bool = True
    """Whether a guard watches the ranks and a keeper stands before each of them."""
    retries: int | None = None
    """How often the guard starts the ranks again inside the job, and how often --requeue puts it back into the queue
    (left out: never again inside the job, and 10 times into the queue)."""
    stall: float | None = None
    """Seconds without a sign of life after which a rank that trains counts as hanging (left out: 600)."""
    start_timeout: float | None = None
    """Seconds to the first training step (left out: 1800 for ranks that give signs of life)."""
    grace: float | None = None
    """Seconds between TERM and KILL, when the guard ends the ranks (left out: 30)."""
    spares: int = 0
    """Nodes beyond those that the ranks need; one that was to blame twice is left out in favour of a spare one."""
    tensor_parallel: int = 1
    """Tensor parallel size, to check the number of ranks."""
    pipeline_parallel: int = 1
    """Pipeline parallel size, to check the number of ranks."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_command()
        self._check_names()
        self._check_paths()
        self._check_environment()
        self._check_schedule()
        self._check_guard()
        self._check_parallel_sizes()

    @property
    def world_size(self) -> int:
        """Ranks in the whole job."""
        return self.nodes * self.gpus_per_node

    @property
    def data_parallel(self) -> int:
        """Copies of the model: ranks / (TP x PP)."""
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def seconds(self) -> int | None:
        """The time limit in seconds."""
        return None if self.time is None else walltime_seconds(self.time)

    @property
    def most_requeues(self) -> int:
        """How often the script puts itself back into the queue, at most."""
        return 10 if self.retries is None else self.retries

    @property
    def all_nodes(self) -> int:
        """Nodes to ask for, the spare ones among them."""
        return self.nodes + self.spares

    def _check_numbers(self) -> None:
        for what, value, most in (
            ("nodes", self.nodes, 100_000),
            ("GPUs per node", self.gpus_per_node, 1024),
            ("CPUs per task", self.cpus_per_task, 4096),
            ("tensor parallel size", self.tensor_parallel, 100_000),
            ("pipeline parallel size", self.pipeline_parallel, 100_000),
            ("seconds before the limit", self.signal_seconds, 65535),
        ):
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{what}: {value} is not between 1 and {most}")

    def _check_command(self) -> None:
        if not self.command or not self.command[0]:
            raise UserError("there is no command to launch: write it behind --, as in -- megatron-ru pretrain_gpt ARGS")
        for word in self.command:
            check_one_line("a word of the command", word)
        if self.command[0].startswith("-") or "=" in self.command[0]:
            raise UserError(
                f"the command begins with {self.command[0]!r}; expected a program there: set variables with --env"
            )

    def _check_names(self) -> None:
        check_matches(
            "the job's name", self.name, _NAME, "a letter, then letters, digits, dots, dashes, underscores, up to 63"
        )
        for what, value in (("the group", self.group), ("the queue", self.queue)):
            if value is not None:
                check_matches(what, value, _ACCOUNT, "letters, digits, dots, dashes and underscores, up to 63")
        for module in self.modules:
            check_matches("a module", module, r"[A-Za-z0-9][\w./+@:-]*", "a name such as cuda/12.4")
        for interface in self.interfaces:
            check_matches("an interface", interface, r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}", "a name such as bond0")

    def _check_paths(self) -> None:
        check_matches(
            "the output folder", self.output, _FOLDER, "letters, digits and . / _ + @ = -: headers quote nothing else"
        )
        for what, path in (
            ("the output folder", self.output),
            ("the virtual environment", self.virtual_environment),
            ("the container image", self.container),
            ("the hostfile", self.hostfile),
        ):
            if path is not None:
                check_path(what, path)
        for mount in self.mounts:
            check_path("a mount", mount)
            check_matches("a mount", mount, r"[^:,]+:/[^:,]*(?::(?:ro|rw))?", "HOST:/CONTAINER or HOST:/CONTAINER:ro")
        if self.mounts and self.container is None:
            raise UserError(f"{len(self.mounts)} mounts without a container: add --container IMAGE or drop --mounts")
        if self.container is not None and self.virtual_environment is not None:
            raise UserError("a virtual environment of the host does not work inside a container: give one of them")

    def _check_environment(self) -> None:
        for name, value in self.env.items():
            check_matches(
                "a variable's name", name, r"[A-Za-z_][A-Za-z0-9_]*", "letters, digits and underscores, no digit first"
            )
            check_one_line(f"the value of {name}", value)
            if name in PROMISED:
                raise UserError(f"{name} is what the launcher itself gives to each rank: drop --env {name}=…")
            if name in _OF_BASH or name.lower().startswith("ru_"):
                raise UserError(f"{name} belongs to the job script or to bash: set it inside the command")

    def _check_schedule(self) -> None:
        seconds = self.seconds
        if self.array is not None:
            first, last, _, _ = array_bounds(self.array)
            if first >= last:
                raise UserError(f"array {self.array!r} counts from {first} to {last}; expected the larger number last")
        if self.dependency is not None:
            check_matches(
                "the dependency", self.dependency, rf"singleton|after(?:ok|any|notok):{_JOB}(?::{_JOB})*",
                "afterok:JOB, afterany:JOB, afternotok:JOB or singleton, with job numbers",
            )  # fmt: skip
        if self.signal is None:
            return
        if self.signal not in SIGNALS:
            raise UserError(f"signal {self.signal!r} is none of {', '.join(SIGNALS)}")
        if seconds is None:
            raise UserError(f"{self.signal} before the time limit needs a limit: add --time HH:MM:SS")
        if self.signal_seconds >= seconds:
            raise UserError(
                f"{self.signal} {self.signal_seconds} s before a limit of {seconds} s would come before the start: "
                "give a longer --time or a smaller --signal-seconds"
            )

    def _check_guard(self) -> None:
        for flag, value, least, most in (
            ("--retries", self.retries, 0, 1000),
            ("--stall", self.stall, 0.1, 10_000_000),
            ("--start-timeout", self.start_timeout, 0.1, 10_000_000),
            ("--grace", self.grace, 0, 100_000),
            ("--spares", self.spares or None, 1, 1000),
        ):
            if value is None:
                continue
            if not least <= value <= most:
                raise UserError(f"{flag} {value:g} is not between {least} and {most}")
            if not self.guard and value:
                raise UserError(f"{flag} is for the guard, which --no-guard leaves out: drop one of them")
        if self.spares and not self.retries:
            raise UserError(f"{self.spares} spare nodes are for further attempts: add --retries 2 or more")

    def _check_parallel_sizes(self) -> None:
        replica = self.tensor_parallel * self.pipeline_parallel
        if self.world_size % replica:
            raise UserError(
                f"{self.nodes} nodes x {self.gpus_per_node} GPUs = {self.world_size} ranks do not divide into model "
                f"replicas of TP {self.tensor_parallel} x PP {self.pipeline_parallel} = {replica}: "
                f"start a multiple of {replica} ranks or change the parallel sizes"
            )


def array_bounds(array: str) -> tuple[int, int, int, int | None]:
    """First, last, step and how many at once (None: no limit). Raises UserError for what is no array."""
    parts = re.fullmatch(r"(\d{1,7})-(\d{1,7})(?::(\d{1,6}))?(?:%(\d{1,6}))?", array, re.ASCII)
    step, at_once = (parts[3], parts[4]) if parts is not None else (None, None)
    if parts is None or step == "0" or at_once == "0":
        raise UserError(f"array {array!r} is not FIRST-LAST, FIRST-LAST:STEP or either with %N behind it, as in 1-8%2")
    return int(parts[1]), int(parts[2]), int(step or 1), None if at_once is None else int(at_once)
