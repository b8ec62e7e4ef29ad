"""The same steps with datatrove's executors as the launcher: on this machine, or as chained job arrays of Slurm.

datatrove starts ranks and keeps their logs. What a rank does, what is done already and what the files are called is
ours, so that the result is that of a run with our own worker processes, byte for byte.
"""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ru.data.config import PipelineConfig
from megatron_ru.data.execution import locked, prepare, run_share
from megatron_ru.data.pipeline import write_manifest
from megatron_ru.data.run import Run
from megatron_ru.data.step import STEPS
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require


def run_through_datatrove(
    config: PipelineConfig, *, slurm: bool, tasks: int, workers: int = 1, partition: str = "", limit: str = "24:00:00",
    memory: int = 2000,
) -> str:  # fmt: skip
    """Runs, or submits, `tasks` ranks of each step and returns a sentence about it.

    `partition`, `limit` and `memory` (megabytes of a rank) are Slurm's; there `workers` is not used. Raises UserError
    without datatrove or Slurm, and when jobs of an earlier submission still work in the folder.
    """
    if tasks < 1:
        raise UserError(f"the number of ranks is {tasks}; it must be at least 1")
    require("datatrove", "this executor", "cluster")
    with locked(config.output):
        if slurm:
            _require_no_jobs(Path(config.output))
        run = prepare(config)
        logs = run.folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
        stages: list[tuple[str, Any, int]] = [
            (name, partial(share, str(run.folder), name), tasks) for name in run.step_names if not run.is_done(name)
        ]
        stages.append(("manifest", partial(finish, str(run.folder)), 1))
        if slurm:
            return _submit(run, stages, logs, partition, limit, memory)
        from datatrove.executor import LocalPipelineExecutor

        for name, function, ranks in stages:
            LocalPipelineExecutor(
                [function], tasks=ranks, workers=min(workers, ranks), logging_dir=str(logs / name), start_method="spawn"
            ).run()
        return f"{run.folder / 'manifest.json'}: {', '.join(run.step_names)} done"


def share(folder: str, name: str, data: object, rank: int = 0, world_size: int = 1) -> None:
    """What a rank of datatrove does for a step."""
    run_share(folder, name, rank, world_size)


def finish(folder: str, data: object, rank: int = 0, world_size: int = 1) -> None:
    """The last job: sums up the last step and writes the manifest."""
    run = Run.load(folder)
    last = run.step_names[-1]
    if not run.is_done(last):
        run.close(last, STEPS[last].tasks(run))
    write_manifest(run)


def _submit(run: Run, stages: list[tuple[str, Any, int]], logs: Path, partition: str, limit: str, memory: int) -> str:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on PATH; submit from a login node of the cluster")
    before, jobs = None, {}
    for name, function, ranks in stages:
        executor = SlurmPipelineExecutor(
            [function], tasks=ranks, time=limit, partition=partition, job_name=f"ru-data-{name}", qos="",
            depends=before, logging_dir=str(logs / name), requeue=False,
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            sbatch_args={"mem-per-cpu": f"{memory}M"} | ({} if partition else {"partition": ""}),
        )  # fmt: skip
        # A job of its own that sums up counts that we do not keep there.
        executor.launch_merge_stats = _nothing
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise UserError(f"Slurm refused the job of the step {name}: {error.output or error}") from None
        jobs[name] = int(executor.job_id)
        before = executor
    (run.folder / "slurm_jobs.json").write_text(json.dumps(jobs))
    return f"{len(jobs)} jobs wait for each other: {', '.join(f'{name} {job}' for name, job in jobs.items())}"


def _nothing() -> None:
    return


def _require_no_jobs(folder: Path) -> None:
    try:
        jobs = json.loads((folder / "slurm_jobs.json").read_text())
    except FileNotFoundError:
        return
    words = ["squeue", "--noheader", "--format=%i", "--jobs", ",".join(map(str, jobs.values()))]
    found = subprocess.run(words, capture_output=True, text=True).stdout.split()
    if found:
        raise UserError(
            f"the Slurm jobs {', '.join(found)} still work in {folder}; wait for them, or end them with scancel"
        )
