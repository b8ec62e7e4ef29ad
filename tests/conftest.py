"""Fixtures for tests that build Megatron's modules in this process, on the CPU."""

import os

# Read when torch's compiler is first imported: what Megatron gives to it must stay plain Python here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest

pytest_plugins = ["tests.training_runs"]


@pytest.fixture
def cpu_device():
    """The installed CPU layer, taken back afterwards."""
    from megatron_ru.seams.cpu_device import CPU_DEVICE

    CPU_DEVICE.install()
    yield CPU_DEVICE
    CPU_DEVICE.undo()


@pytest.fixture(scope="module")
def one_process():
    """Megatron's model parallel state for this process alone: gloo, TP = PP = DP = 1, on the CPU layer.

    A module of tests has it to itself; everything is taken back after the last of them.
    """
    import torch.distributed

    from megatron_ru.seams.cpu_device import CPU_DEVICE

    CPU_DEVICE.install()
    try:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        CPU_DEVICE.install_in_megatron()
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            yield parallel_state
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    finally:
        CPU_DEVICE.undo()
