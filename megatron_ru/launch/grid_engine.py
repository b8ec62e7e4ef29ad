"""Scripts for the Grid Engine of ABCI 2.0, whose nodes differ in a resource type and a number of GPUs."""

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import guard_parts, shell_parts
from megatron_ru.launch.job_spec import JobSpec, array_bounds
from megatron_ru.launch.quoting import quoted
from megatron_ru.launch.target import LaunchScript
from megatron_ru.launch.walltime import hours_minutes_seconds

TAKES = ("time", "group", "container", "output", "array", "dependency", "requeue", "signal", "interfaces",
         "spares")  # fmt: skip
NEEDS = ("time", "group")


def grid_engine_script(job: JobSpec, resource: str, machine: str) -> LaunchScript:
    """The script that asks for whole nodes by `-l resource=N` and starts its ranks with mpirun.

    ABCI takes the group on the command line alone.
    """
    submit = ("qsub", "-g", job.group or "")
    text = f"""#!/bin/bash
# {machine}: {shell_parts.described(job)}. To submit: {quoted(submit)} FILE
{_header(job, resource)}
{shell_parts.OPENING}{shell_parts.FIRST_ADDRESS}{shell_parts.FREE_PORT}{shell_parts.HOSTFILE}\
{shell_parts.hosts_function(("SGE_JOB_HOSTLIST", "PE_HOSTFILE"))}\
{shell_parts.prologue(job)}\
{_array_index(job)}\
{_signal(job)}\
{shell_parts.hostfile_in_temporary_file("ru_hosts", job.gpus_per_node)}\
{shell_parts.meeting_place(job, _number(job))}\
{shell_parts.mpirun(job, _number(job))}\
{_ended(job)}"""
    return LaunchScript(text=text, submit=(*submit, "-terse"), check=(*submit, "-w", "v"))


def _header(job: JobSpec, resource: str) -> str:
    seconds = job.seconds or 0
    lines = [
        "-cwd",
        f"-N {job.name}",
        f"-l {resource}={job.all_nodes}",
        f"-l h_rt={hours_minutes_seconds(seconds)}",
        "-j y",
        f"-o {job.output.rstrip('/')}/",
        f"-r {'y' if job.requeue else 'n'}",
    ]
    if job.signal is not None:
        lines.append(f"-l s_rt={hours_minutes_seconds(seconds - job.signal_seconds)}")
    if job.array is not None:
        lines += _array(job.array)
    if job.dependency is not None:
        lines.append(f"-hold_jid {_held_by(job.dependency)}")
    return "\n".join(f"#$ {line}" for line in lines)


def _array(array: str) -> list[str]:
    first, last, step, at_once = array_bounds(array)
    if first == 0:
        raise UserError(f"array {array!r} begins at 0, and Grid Engine counts from 1: begin at 1")
    return [f"-t {first}-{last}:{step}", *([] if at_once is None else [f"-tc {at_once}"])]


def _held_by(dependency: str) -> str:
    kind, *jobs = dependency.split(":")
    if kind != "afterany":
        raise UserError(
            f"Grid Engine waits for the end of a job, however it ended, and cannot do {kind}: "
            f"say afterany:{':'.join(jobs) or 'JOB'}"
        )
    return ",".join(jobs)


def _signal(job: JobSpec) -> str:
    if job.signal is None:
        return ""
    if job.signal != "USR1":
        raise UserError(f"Grid Engine sends USR1 at the soft limit and no {job.signal}: say --signal USR1")
    return "\n# It comes to this shell too, which would end by it; mpirun passes it on to the ranks.\ntrap : USR1\n"


def _ended(job: JobSpec) -> str:
    if not job.guard:
        return ""
    kept = """
# Grid Engine would take a job back at code 99, and hold it at 100, whatever a rank meant by them.
if [ "$ru_code" -eq 99 ] || [ "$ru_code" -eq 100 ]; then ru_code=1; fi
"""
    return kept + guard_parts.ended(job, guard_parts.requeue_grid_engine(job))


def _array_index(job: JobSpec) -> str:
    return "" if job.array is None else '\nexport RU_ARRAY_INDEX="$SGE_TASK_ID"\n'


def _number(job: JobSpec) -> str:
    # All tasks of an array have one number; two of them may share a host's network.
    return "$JOB_ID" if job.array is None else "$((JOB_ID + SGE_TASK_ID))"
