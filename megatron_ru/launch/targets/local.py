"""Processes on this machine, started by nothing but bash."""

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import shell_parts
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import LaunchScript, target


@target("local", "processes on this machine, with or without GPUs", gpus_per_node=1, takes=())
def render_local(job: JobSpec) -> LaunchScript:
    """A script for `bash` whose exit code is that of the first rank to fail; the others are terminated."""
    if job.nodes > 1:
        raise UserError(f"local is this machine alone, not {job.nodes} nodes: take torchrun or mpirun")
    text = f"""#!/bin/bash
# This machine: {shell_parts.described(job)}. To start: bash FILE
{shell_parts.OPENING}{shell_parts.FREE_PORT}\
{shell_parts.prologue(job)}\

export MASTER_ADDR=127.0.0.1 WORLD_SIZE={job.world_size} LOCAL_WORLD_SIZE={job.world_size}
MASTER_PORT=$(ru_free_port "$$" "$MASTER_ADDR")
export MASTER_PORT

ru_ranks=()
trap 'kill "${{ru_ranks[@]}}" 2>/dev/null || true; exit 143' TERM
trap 'kill "${{ru_ranks[@]}}" 2>/dev/null || true; exit 130' INT
for ((ru_rank = 0; ru_rank < {job.world_size}; ru_rank++)); do
    (export RANK=$ru_rank LOCAL_RANK=$ru_rank; exec "${{ru_command[@]}}") &
    ru_ranks+=("$!")
done

# The first rank that fails takes the others with it. (`wait -n` forgets ranks that ended before it was called.)
ru_code=0
while [ "${{#ru_ranks[@]}}" -gt 0 ] && [ "$ru_code" -eq 0 ]; do
    for ru_rank in "${{!ru_ranks[@]}}"; do
        if kill -0 "${{ru_ranks[ru_rank]}}" 2>/dev/null; then continue; fi
        wait "${{ru_ranks[ru_rank]}}" || ru_code=$?
        unset "ru_ranks[ru_rank]"
        if [ "$ru_code" -ne 0 ]; then break; fi
    done
    sleep 0.2
done
kill "${{ru_ranks[@]}}" 2>/dev/null || true
wait
exit "$ru_code"
"""
    return LaunchScript(text=text, submit=("bash",), check=("bash", "-n"))
