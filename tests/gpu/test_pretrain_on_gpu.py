"""The same command line on a GPU and on the CPU gives the same losses (fp32)."""

import pytest
import torch

from tests.training_runs import relative_difference

pytestmark = pytest.mark.gpu


def on_gpu(trainer, processes, *extra, name):
    run = trainer.run(processes, "--device", "cuda", *extra, name=name)
    run.assert_trained(range(1, 21))
    return run


def test_gpu_gives_the_losses_of_the_cpu(trainer, single):
    run = on_gpu(trainer, 1, name="gpu")
    # Another draw of the same distribution: the generators of CPU and GPU differ, so the curves agree, not the bits.
    assert abs(run.losses[1] - single.losses[1]) / single.losses[1] < 2e-2
    assert run.losses[20] < run.losses[1] - 0.5


def test_checkpoint_of_the_gpu_continues_exactly(trainer):
    save = trainer.folder / "gpu_checkpoints"
    whole = on_gpu(trainer, 1, "--use-distributed-optimizer", name="gpu_whole")
    first = trainer.run(1, "--device", "cuda", "--use-distributed-optimizer", "--save", str(save), "--save-interval",
                        "10", "--exit-interval", "10", name="gpu_first")  # fmt: skip
    first.assert_trained(range(1, 11))
    second = trainer.run(1, "--device", "cuda", "--use-distributed-optimizer", "--load", str(save), name="gpu_second")
    second.assert_trained(range(11, 21))
    assert relative_difference(whole, second) < 1e-6


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one CUDA device, this needs two")
@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        ("--pipeline-model-parallel-size", "2"),
        ("--use-distributed-optimizer",),
    ],
    ids=["tp2_sp", "pp2", "dp2"],
)
def test_two_gpus_give_the_losses_of_one(trainer, flags):
    one = on_gpu(trainer, 1, name="gpu_one")
    two = on_gpu(trainer, 2, *flags, name=f"gpu_two_{flags[0].strip('-')}")
    assert relative_difference(one, two) < 1e-4
