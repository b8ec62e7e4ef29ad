"""Processes on this machine, started by nothing but bash."""

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import guard_parts, shell_parts
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import LaunchScript, target

_LOOP = r"""
# Starts the ranks and ends with the code of the first to fail, which takes the others with it.
# shellcheck disable=SC2329
ru_start_ranks() {
    local ru_rank ru_code
    ru_ranks=()
    trap 'kill "${ru_ranks[@]}" 2>/dev/null || true; exit 143' TERM
    trap 'kill "${ru_ranks[@]}" 2>/dev/null || true; exit 130' INT
    for ((ru_rank = 0; ru_rank < WORLD_SIZE; ru_rank++)); do
        (unset -f ru_start_ranks; export RANK=$ru_rank LOCAL_RANK=$ru_rank; exec "$@") &
        ru_ranks+=("$!")
    done

    # The first rank that fails takes the others with it. (`wait -n` forgets ranks that ended before it was called.)
    ru_code=0
    while [ "${#ru_ranks[@]}" -gt 0 ] && [ "$ru_code" -eq 0 ]; do
        for ru_rank in "${!ru_ranks[@]}"; do
            if kill -0 "${ru_ranks[ru_rank]}" 2>/dev/null; then continue; fi
            wait "${ru_ranks[ru_rank]}" || ru_code=$?
            unset "ru_ranks[ru_rank]"
            if [ "$ru_code" -ne 0 ]; then break; fi
        done
        sleep 0.2
    done
    kill "${ru_ranks[@]}" 2>/dev/null || true
    wait
    exit "$ru_code"
}
export -f ru_start_ranks
"""


@target("local", "processes on this machine, with or without GPUs", gpus_per_node=1, takes=())
def render_local(job: JobSpec) -> LaunchScript:
    """A script for `bash` whose exit code is that of the first rank to fail; the others are terminated."""
    if job.nodes > 1:
        raise UserError(f"local is this machine alone, not {job.nodes} nodes: take torchrun or mpirun")
    command = f'{guard_parts.keeper(job)}"${{ru_command[@]}}"'
    inside = "bash -euo pipefail -c 'ru_start_ranks \"$@\"' local " if job.guard else "ru_start_ranks "
    text = f"""#!/bin/bash
# This machine: {shell_parts.described(job)}. To start: bash FILE
{shell_parts.OPENING}{shell_parts.FREE_PORT}\
{shell_parts.prologue(job)}\

export MASTER_ADDR=127.0.0.1 WORLD_SIZE={job.world_size} LOCAL_WORLD_SIZE={job.world_size}
MASTER_PORT=$(ru_free_port "$$" "$MASTER_ADDR")
export MASTER_PORT
{_LOOP}
{guard_parts.started(job, inside + command, number="$$")}\
{guard_parts.ended(job)}"""
    return LaunchScript(text=text, submit=("bash",), check=("bash", "-n"))
