"""The pieces of bash that job scripts are put together from. Names of the script's own begin with ru_."""

from collections.abc import Sequence

from megatron_ru.launch import guard_parts
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.quoting import quoted, quoted_lines

# Where a hosts file can come from; each prints a host to a line, perhaps repeated.
HOST_SOURCES = {
    "SGE_JOB_HOSTLIST": """[ -r "${SGE_JOB_HOSTLIST:-}" ]; then cat "$SGE_JOB_HOSTLIST\"""",
    "PE_HOSTFILE": """[ -r "${PE_HOSTFILE:-}" ]; then cat "$PE_HOSTFILE\"""",
    "PBS_NODEFILE": """[ -r "${PBS_NODEFILE:-}" ]; then cat "$PBS_NODEFILE\"""",
    "SLURM_JOB_NODELIST": """[ -n "${SLURM_JOB_NODELIST:-}" ]; then scontrol show hostnames "$SLURM_JOB_NODELIST\"""",
}

# Bash reads what stands in single quotes later, commas are part of words, and the file of modules is on the cluster.
OPENING = """# shellcheck disable=SC1091,SC2016,SC2054
set -euo pipefail
"""

FIRST_ADDRESS = r"""
# The first global IPv4 address of the interfaces named, else of any that leads out of this host, else what its name
# stands for, else the name.
ru_first_address() {
    local interface address
    for interface in "$@"; do
        address=$(ip -4 -o addr show dev "$interface" scope global 2>/dev/null |
            awk 'NR == 1 { sub(/\/.*/, "", $4); print $4 }') || true
        if [ -n "$address" ]; then printf '%s\n' "$address"; return; fi
    done
    address=$(ip -4 -o addr show scope global 2>/dev/null |
        awk '$2 !~ /^(docker|virbr|veth|br-)/ && !n++ { sub(/\/.*/, "", $4); print $4 }') || true
    if [ -z "$address" ]; then
        address=$(getent ahostsv4 "$(hostname)" 2>/dev/null | awk '$1 !~ /^127\./ && !n++ { print $1 }') || true
    fi
    printf '%s\n' "${address:-$(hostname)}"
}
"""

FREE_PORT = r"""
# 10000 + job number mod 20000, below the ports that outgoing connections take; the next one where somebody listens.
ru_free_port() {
    local number=${1//[!0-9]/} port host tries
    number=${number:0:15}
    port=$((10000 + 10#${number:-0} % 20000))
    for ((tries = 0; tries < 100; tries++)); do
        for host in 127.0.0.1 "$2"; do
            if timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$port" 2>/dev/null; then
                port=$((10000 + (port - 9999) % 20000))
                continue 2
            fi
        done
        printf '%s\n' "$port"
        return
    done
    echo "100 ports up to $port are taken on $2: is something left over from another job?" >&2
    return 1
}
"""

HOSTFILE = r"""
# Hosts, one to a line and perhaps repeated, as a hostfile with slots: each once, this host first, since rank 0 shall
# run where the meeting place is.
ru_with_slots() {
    local here
    here=$(hostname)
    awk -v here="${here%%.*}" -v slots="$1" '
        /^[ \t]*(#|$)/ || seen[$1]++ { next }
        { short = $1; sub(/\..*/, "", short); line = $1 " slots=" slots "\n" }
        short == here { first = first line; next }
        { rest = rest line }
        END { printf "%s%s", first, rest }'
}
"""

# Of Open MPI; without them mpirun waits on for ever after a link was cut.
KEEPALIVE = (
    "-mca", "oob_tcp_keepalive_time", "5",
    "-mca", "oob_tcp_keepalive_intvl", "2",
    "-mca", "oob_tcp_keepalive_probes", "3",
)  # fmt: skip

# What mpirun's remote ranks need from the script, beside what the user set.
_TRAVELS = ("MASTER_ADDR", "MASTER_PORT", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "RU_ARRAY_INDEX")


def hosts_function(sources: Sequence[str]) -> str:
    """`ru_hosts`, which prints the hosts of the job from the first of `sources` that is there."""
    branches = "\n    el".join(f"if {HOST_SOURCES[source]}" for source in sources)
    return f"""
# The hosts of this job, as the scheduler names them.
ru_hosts() {{
    {branches}
    else hostname
    fi
}}
"""


def prologue(job: JobSpec) -> str:
    """Modules, virtual environment, the variables of the user, the command as the array `ru_command`, and whether a
    guard can be started."""
    parts = []
    if job.modules:
        lines = [
            "",
            "# A plain script knows no modules before this file is read; neither is written for set -u.",
            "set +u",
            "if [ -r /etc/profile.d/modules.sh ]; then source /etc/profile.d/modules.sh; fi",
        ]
        # One by one: `module load bad good` says that it failed, and has loaded good.
        for module in job.modules:
            sentence = quoted([f"module {module} could not be loaded: see module avail"])
            lines.append(f"module load {quoted([module])} || {{ echo {sentence} >&2; exit 1; }}")
        parts.append("\n".join([*lines, "set -u", ""]))
    if job.virtual_environment is not None:
        activate = quoted([f"{job.virtual_environment.rstrip('/')}/bin/activate"])
        parts.append(f"\nset +u\nsource {activate}\nset -u\n")
    if job.env:
        parts.append("\n# Variables of every rank.\n")
        parts += [f"export {name}={quoted([value])}\n" for name, value in job.env.items()]
    parts.append("\n# What every rank runs.\n")
    # An image may set the same variables, and they would win over those of the job.
    words = ["env", *(f"{name}={value}" for name, value in job.env.items())] if job.env and job.container else []
    lines = ([f"    {quoted(words)}"] if words else []) + [quoted_lines(job.command)]
    parts.append("ru_command=(\n" + "\n".join(lines) + "\n)\n")
    parts.append(guard_parts.check(job))
    return "".join(parts)


def rank_wrapper(rank: str, size: str, local_rank: str, local_size: str) -> str:
    """The words that come before the command: a shell that gives torch's names to the launcher's numbers."""
    exports = f'RANK="${rank}" WORLD_SIZE="${size}" LOCAL_RANK="${local_rank}" LOCAL_WORLD_SIZE="${local_size}"'
    return f"bash -c 'export {exports}; exec \"$@\"' rank"


def singularity(job: JobSpec) -> str:
    """The words that enter the container, with a blank behind; empty without one."""
    if job.container is None:
        return ""
    binds = [word for mount in job.mounts for word in ("--bind", mount)]
    return quoted(["singularity", "exec", "--nv", *binds, job.container]) + " "


def mpirun(job: JobSpec, number: str, *, before: str = "", options: str = "", address: str = "$MASTER_ADDR") -> str:
    """Checks the hostfile `ru_hostfile`, then starts the ranks over it with Open MPI.

    `before` are words in front of mpirun, with a blank behind, where there is no guard; `number`, `options` and
    `address` are the guard's.
    """
    wrapper = rank_wrapper(*(f"OMPI_COMM_WORLD_{tail}" for tail in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    names = " ".join(dict.fromkeys((*_TRAVELS, *job.env)))
    of_guard = "".join(f" -x {name}" for name in guard_parts.TRAVELS) if job.guard else ""
    spare = '--hostfile "$ru_hostfile"' if job.spares else ""
    # With spare hosts the file is written anew for each attempt.
    launcher = f"""{"" if job.guard else before}mpirun -np {job.world_size} -npernode {job.gpus_per_node} \\
    -hostfile "$ru_hostfile" --bind-to none \\
    {quoted(KEEPALIVE)} \\
    "${{ru_travels[@]}}"{of_guard} \\
    {wrapper} \\
    {guard_parts.keeper(job)}{singularity(job)}"${{ru_command[@]}}\""""
    start = guard_parts.started(
        job, launcher, number=number, address=address, options=" ".join(word for word in (options, spare) if word)
    )
    return f"""
ru_found=$(wc -l <"$ru_hostfile")
if [ "$ru_found" -ne {job.all_nodes} ]; then
    echo "this script is made for {job.all_nodes} nodes, and there are $ru_found: $(tr '\\n' ' ' <"$ru_hostfile")" >&2
    exit 1
fi

# Ranks on other hosts see only what is named here.
ru_travels=()
for ru_name in {names}; do
    if [ -n "${{!ru_name+set}}" ]; then ru_travels+=(-x "$ru_name"); fi
done

# With the keepalive options mpirun ends when a host is gone, instead of waiting for ever.
{start}"""


def hostfile_in_temporary_file(source: str, slots: int) -> str:
    """Writes `ru_hostfile` from the command `source`, and has it removed at the end."""
    return f"""
ru_hostfile=$(mktemp)
trap 'rm -f "$ru_hostfile"' EXIT
{source} | ru_with_slots {slots} >"$ru_hostfile"
"""


def meeting_place(job: JobSpec, number: str) -> str:
    """Sets MASTER_ADDR to this host's address and MASTER_PORT to a port made of `number`, a bash expression."""
    named = "".join(f" {quoted([interface])}" for interface in job.interfaces or ("bond0",))
    return f"""
MASTER_ADDR=$(ru_first_address{named})
MASTER_PORT=$(ru_free_port "{number}" "$MASTER_ADDR")
export MASTER_ADDR MASTER_PORT
"""


def described(job: JobSpec) -> str:
    """One line: how large the job is and how it divides."""
    split = (
        f", TP {job.tensor_parallel} x PP {job.pipeline_parallel} x DP {job.data_parallel}"
        if job.tensor_parallel * job.pipeline_parallel > 1
        else ""
    )
    nodes = ("1 node" if job.nodes == 1 else f"{job.nodes} nodes") + (f" ({job.spares} spare)" if job.spares else "")
    gpus = f"{job.gpus_per_node} GPU{'' if job.gpus_per_node == 1 else 's'}"
    return f"{nodes} x {gpus} = {job.world_size} rank{'' if job.world_size == 1 else 's'}{split}"
