"""ABCI A nodes: 8 A100 of 40 GB each, Grid Engine."""

from megatron_ru.launch.grid_engine import NEEDS, TAKES, grid_engine_script
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import LaunchScript, target


@target(
    "abci-a",
    "ABCI 2.0, A nodes with 8 A100, Grid Engine",
    gpus_per_node=8, whole_nodes=True, most_nodes=64, takes=TAKES, needs=NEEDS,
)  # fmt: skip
def render_abci_a(job: JobSpec) -> LaunchScript:
    """A script with `rt_AF`, for `qsub -g GROUP`."""
    return grid_engine_script(job, "rt_AF", "ABCI A nodes, 8 A100 each")
