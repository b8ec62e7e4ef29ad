"""Open MPI over the hosts of a file, without a scheduler."""

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import guard_parts, shell_parts
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.quoting import quoted
from megatron_ru.launch.target import LaunchScript, target

# mpirun may be started on a host that is none of the ranks'.
_FIRST_HOST = r"""
ru_address=$MASTER_ADDR
ru_first=$(awk 'NR == 1 { print $1 }' "$ru_hostfile")
ru_here=$(hostname)
if [ "$ru_first" != localhost ] && [ "${ru_first%%.*}" != "${ru_here%%.*}" ]; then
    ru_there=$(getent ahostsv4 "$ru_first" | awk 'NR == 1 { print $1 }') || true
    MASTER_ADDR=${ru_there:-$ru_first}
    MASTER_PORT=$(ru_free_port "$$" "$MASTER_ADDR")
fi
"""


@target(
    "mpirun",
    "Open MPI over a plain hostfile, no scheduler",
    gpus_per_node=8,
    takes=("container", "hostfile", "interfaces", "spares"),
)
def render_mpirun(job: JobSpec) -> LaunchScript:
    """A script for `bash`. Each host of the file gets its slots here, whatever the file says of them."""
    if job.hostfile is None and job.all_nodes > 1:
        raise UserError(f"mpirun does not know the {job.all_nodes} hosts: name a file that lists them with --hostfile")
    source = "hostname" if job.hostfile is None else f"cat {quoted([job.hostfile])}"
    text = f"""#!/bin/bash
# Open MPI: {shell_parts.described(job)}. To start: bash FILE
{shell_parts.OPENING}{shell_parts.FIRST_ADDRESS}{shell_parts.FREE_PORT}{shell_parts.HOSTFILE}\
{shell_parts.prologue(job)}\
{shell_parts.hostfile_in_temporary_file(source, job.gpus_per_node)}\
{shell_parts.meeting_place(job, "$$")}\
{_FIRST_HOST if job.hostfile is not None else ""}\
{shell_parts.mpirun(job, "$$", address="$ru_address" if job.hostfile is not None else "$MASTER_ADDR")}\
{guard_parts.ended(job)}"""
    return LaunchScript(text=text, submit=("bash",), check=("bash", "-n"))
