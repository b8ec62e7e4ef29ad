"""ABCI V nodes: 4 V100 of 16 GB each, Grid Engine."""

from megatron_ru.launch.grid_engine import NEEDS, TAKES, grid_engine_script
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import LaunchScript, target


@target(
    "abci-v",
    "ABCI 2.0, V nodes with 4 V100, Grid Engine",
    gpus_per_node=4, whole_nodes=True, most_nodes=512, takes=TAKES, needs=NEEDS,
)  # fmt: skip
def render_abci_v(job: JobSpec) -> LaunchScript:
    """A script with `rt_F`, for `qsub -g GROUP`."""
    return grid_engine_script(job, "rt_F", "ABCI V nodes, 4 V100 each")
