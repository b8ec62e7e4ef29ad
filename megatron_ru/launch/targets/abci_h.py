"""ABCI 3.0 H nodes: 8 H200 each, PBS Professional."""

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import guard_parts, shell_parts
from megatron_ru.launch.job_spec import JobSpec, array_bounds
from megatron_ru.launch.target import LaunchScript, target
from megatron_ru.launch.walltime import hours_minutes_seconds


@target(
    "abci-h",
    "ABCI 3.0, H nodes with 8 H200, PBS Professional",
    gpus_per_node=8, whole_nodes=True, needs=("time", "group"),
    takes=("time", "group", "queue", "container", "output", "array", "dependency", "requeue", "signal", "interfaces",
           "spares"),
)  # fmt: skip
def render_abci_h(job: JobSpec) -> LaunchScript:
    """A script for `qsub`, in the queue rt_HF unless another one is named. PBS has no way to check it."""
    index = "" if job.array is None else '\nexport RU_ARRAY_INDEX="$PBS_ARRAY_INDEX"\n'
    # 123.server, or 123[4].server in an array.
    job_number = "${PBS_JOBID%%[!0-9]*}"
    number = job_number if job.array is None else f"$(({job_number} + PBS_ARRAY_INDEX))"
    text = f"""#!/bin/bash
# ABCI H nodes, 8 H200 each: {shell_parts.described(job)}. To submit: qsub FILE
{_header(job)}
{shell_parts.OPENING}cd "$PBS_O_WORKDIR"
{shell_parts.FIRST_ADDRESS}{shell_parts.FREE_PORT}{shell_parts.HOSTFILE}\
{shell_parts.hosts_function(("PBS_NODEFILE",))}\
{shell_parts.prologue(job)}\
{index}\
{shell_parts.hostfile_in_temporary_file("ru_hosts", job.gpus_per_node)}\
{shell_parts.meeting_place(job, number)}\
{shell_parts.mpirun(job, number, before=_signal(job), options=_signal_of_guard(job))}\
{guard_parts.ended(job, guard_parts.requeue_pbs(job))}"""
    return LaunchScript(text=text, submit=("qsub",))


def _header(job: JobSpec) -> str:
    lines = [
        f"-P {job.group}",
        f"-q {job.queue or 'rt_HF'}",
        f"-N {job.name}",
        f"-l select={job.all_nodes}",
        f"-l walltime={hours_minutes_seconds(job.seconds or 0)}",
        "-j oe",
        f"-o {job.output.rstrip('/')}/",
        f"-r {'y' if job.requeue else 'n'}",
    ]
    if job.array is not None:
        first, last, step, at_once = array_bounds(job.array)
        lines.append(f"-J {first}-{last}:{step}" + ("" if at_once is None else f"%{at_once}"))
    if job.dependency is not None:
        if job.dependency == "singleton":
            raise UserError("PBS knows no singleton: say afterok:JOB, afterany:JOB or afternotok:JOB")
        lines.append(f"-W depend={job.dependency}")
    return "\n".join(f"#PBS {line}" for line in lines)


def _signal(job: JobSpec) -> str:
    """PBS itself sends nothing before the limit; `timeout` signals mpirun, which passes it on, and waits."""
    if job.signal is None:
        return ""
    after = (job.seconds or 0) - job.signal_seconds
    if job.signal not in ("USR1", "USR2", "TERM"):
        raise UserError(f"mpirun passes USR1, USR2 and TERM on to its ranks, and no {job.signal}: take one of them")
    return f"timeout --foreground --preserve-status --signal={job.signal} {after} "


def _signal_of_guard(job: JobSpec) -> str:
    """The guard gives the signal to itself."""
    return "" if job.signal is None else f"--signal-after {job.signal}@{(job.seconds or 0) - job.signal_seconds}"
