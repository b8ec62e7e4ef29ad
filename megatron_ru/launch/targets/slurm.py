"""Slurm: one task for each rank, or one torchrun for each node; containers by pyxis."""

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import guard_parts, shell_parts
from megatron_ru.launch.job_spec import JobSpec, array_bounds
from megatron_ru.launch.quoting import quoted
from megatron_ru.launch.target import LaunchScript, target
from megatron_ru.launch.walltime import days_hours_minutes_seconds


@target(
    "slurm",
    "Slurm, with srun for each rank or torchrun for each node",
    gpus_per_node=8,
    takes=("time", "group", "queue", "cpus_per_task", "container", "output", "array", "dependency", "requeue",
           "signal", "interfaces", "torchrun", "spares"),
)  # fmt: skip
def render_slurm(job: JobSpec) -> LaunchScript:
    """A script for `sbatch`; the batch step runs on the first node, and that is where the ranks meet."""
    index = "" if job.array is None else '\nexport RU_ARRAY_INDEX="$SLURM_ARRAY_TASK_ID"\n'
    text = f"""#!/bin/bash
# Slurm: {shell_parts.described(job)}. To submit: sbatch FILE
{_header(job)}
{shell_parts.OPENING}{shell_parts.FIRST_ADDRESS}{shell_parts.FREE_PORT}\
{shell_parts.prologue(job)}\
{index}\
{shell_parts.meeting_place(job, "$SLURM_JOB_ID")}\
{_start(job)}\
{guard_parts.ended(job, guard_parts.requeue_slurm(job))}"""
    return LaunchScript(text=text, submit=("sbatch", "--parsable"), check=("sbatch", "--test-only"))


def _header(job: JobSpec) -> str:
    tasks = 1 if job.torchrun else job.gpus_per_node
    lines = [
        f"--job-name={job.name}",
        f"--nodes={job.all_nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gres=gpu:{job.gpus_per_node}",
        f"--output={job.output.rstrip('/')}/slurm-{'%j' if job.array is None else '%A_%a'}.out",
        f"--{'requeue' if job.requeue else 'no-requeue'}",
    ]
    if job.requeue:
        lines.append("--open-mode=append")
    if job.cpus_per_task is not None:
        lines.append(f"--cpus-per-task={_cpus(job)}")
    if job.seconds is not None:
        lines.append(f"--time={days_hours_minutes_seconds(job.seconds)}")
    if job.group is not None:
        lines.append(f"--account={job.group}")
    if job.queue is not None:
        lines.append(f"--partition={job.queue}")
    if job.array is not None:
        array_bounds(job.array)
        lines.append(f"--array={job.array}")
    if job.dependency is not None:
        lines.append(f"--dependency={job.dependency}")
    if job.signal is not None:
        if job.torchrun and not job.guard and job.signal not in ("TERM", "INT"):
            raise UserError(f"torchrun ends by {job.signal} and does not pass it on: say TERM, or leave --no-guard out")
        # With a guard to this script alone, whose guard tells the ranks; without one to the ranks.
        lines.append(f"--signal={'B:' if job.guard else ''}{job.signal}@{job.signal_seconds}")
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _start(job: JobSpec) -> str:
    # srun learns the number of cores only when it is told again.
    cores = "" if job.cpus_per_task is None else f" --cpus-per-task={_cpus(job)}"
    container = ""
    if job.container is not None:
        words = [f"--container-image={job.container}"]
        if job.mounts:
            words.append(f"--container-mounts={','.join(job.mounts)}")
        container = f" \\\n    {quoted(words)}"
    keeper = guard_parts.keeper(job) if job.container is None else guard_parts.keeper_in_image(job)
    if job.torchrun:
        before = """
# One torchrun for each node. A restart inside the job needs a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
"""
        tasks = f" --nodes={job.nodes} --ntasks={job.nodes}" if job.spares else ""
        launcher = f"""srun --kill-on-bad-exit=1 --ntasks-per-node=1{tasks}{cores}{container} \\
    bash -c 'exec torchrun --nnodes {job.nodes} --node-rank "$SLURM_NODEID" --nproc-per-node {job.gpus_per_node} \\
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python "$@"' node \\
    {keeper}"${{ru_command[@]}}\""""
    else:
        wrapper = shell_parts.rank_wrapper("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "RU_LOCAL_SIZE")
        before = f"""
# A rank that fails takes the others with it instead of leaving them waiting.
export RU_LOCAL_SIZE={job.gpus_per_node}
"""
        # A step on fewer nodes than the job has.
        tasks = f" --nodes={job.nodes} --ntasks={job.world_size}" if job.spares else ""
        launcher = f"""srun --kill-on-bad-exit=1{tasks}{cores}{container} \\
    {wrapper} \\
    {keeper}"${{ru_command[@]}}\""""
    return before + guard_parts.started(job, launcher, number="$SLURM_JOB_ID")


def _cpus(job: JobSpec) -> int:
    """Cores of one task: of a rank, or of all ranks of a node under its torchrun."""
    return (job.cpus_per_task or 1) * (job.gpus_per_node if job.torchrun else 1)
