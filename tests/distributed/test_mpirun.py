"""`mpirun -np 4` with no rank variable exported trains; a failed rank's exit code comes through."""

import os
import shutil
import sys
from pathlib import Path

import pytest

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun; pip install 'megatron-ru[mpi]' brings one")

FOUR = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


def mpirun():
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [MPIRUN, *root, "--oversubscribe", "-np", "4", sys.executable, "-m", "megatron_ru.pretrain_gpt"]


def test_mpirun_alone_trains_with_the_losses_of_one_process(trainer, single):
    run = trainer.run(4, *FOUR, name="mpirun", steps=5, command=mpirun())
    run.assert_trained(range(1, 6))
    reference = single.losses
    assert all(abs(loss - reference[step]) / reference[step] < 1e-4 for step, loss in run.losses.items())


def test_exit_code_of_a_refused_run_comes_through_mpirun(trainer):
    run = trainer.run(4, *FOUR, "--data-path", "nothing", name="mpirun_refused", command=mpirun())
    assert run.returncode == 2
    assert "there is no nothing.bin" in run.output
