"""torchrun on one machine, or on several that are started by hand."""

from megatron_ru.launch import guard_parts, shell_parts
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import LaunchScript, target


@target("torchrun", "torchrun on one node, or by hand on several", gpus_per_node=8, takes=())
def render_torchrun(job: JobSpec) -> LaunchScript:
    """A script for `bash`; with several nodes for each of them, with its number in NODE and node 0's address
    in MASTER."""
    where = "bash FILE" if job.nodes == 1 else "NODE=0 MASTER=ADDRESS bash FILE, on each node with its own NODE"
    text = f"""#!/bin/bash
# torchrun: {shell_parts.described(job)}. To start: {where}
{shell_parts.OPENING}{shell_parts.FREE_PORT if job.nodes == 1 else _SEVERAL_NODES}\
{shell_parts.prologue(job)}\
{_start(job)}\
{guard_parts.ended(job)}"""
    return LaunchScript(text=text, submit=("bash",), check=("bash", "-n"))


_SEVERAL_NODES = """
: "${NODE:?the number of this machine, from 0}"
: "${MASTER:?an address of machine 0 that all others reach}"
: "${PORT:=29500}" # the same on every machine, free on machine 0, and below the ports of outgoing connections
"""

_MEETING_PLACE = """
export MASTER_ADDR=127.0.0.1
MASTER_PORT=$(ru_free_port "$$" "$MASTER_ADDR")
export MASTER_PORT
"""
_MEETING_PLACE_OF_SEVERAL = """
# The guard of node 0 listens on the port after the store's; the guards of the other nodes do what it says.
export MASTER_ADDR="$MASTER" MASTER_PORT="$PORT"
"""


def _start(job: JobSpec) -> str:
    if job.nodes == 1:
        place, nodes, options, number = _MEETING_PLACE, "", "", "$$"
    else:
        place, nodes = _MEETING_PLACE_OF_SEVERAL, f'--nnodes {job.nodes} --node-rank "$NODE" '
        options, number = f'--nodes {job.nodes} --node "$NODE" --port "$((PORT + 1))"', "torchrun-$PORT"
    launcher = f"""bash -c 'exec torchrun {nodes}--nproc-per-node {job.gpus_per_node} \\
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python "$@"' node \\
    {guard_parts.keeper(job)}"${{ru_command[@]}}\""""
    return f"""{place}
# A restart inside the job needs a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
{"" if job.guard else "exec "}{guard_parts.started(job, launcher, number=number, options=options)}"""
