"""Megatron's process for asynchronous saves, on a machine without a GPU.

It is a fresh process, in which `torch.cuda` is as it was: it would end at its first line, and the run would wait for it
in its first save.
"""

from typing import Any

from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

_ASYNC = "megatron.core.dist_checkpointing.strategies.async_utils"


def cpu_writer_seams() -> list[Seam]:
    """The seam on the writing process."""
    return [
        Seam(
            target=f"{_ASYNC}:PersistentAsyncCaller.async_loop",
            # The new process finds a function by its name, so this must be one of a module.
            make=lambda original: staticmethod(write_without_gpu),
            expects=("rank", "queue", "preload_q", "comp_q"),
            reason="the process that writes asks CUDA for a device",
        )
    ]


def write_without_gpu(*arguments: Any, **keywords: Any) -> None:
    """Megatron's loop of that process, with the CPU layer around it."""
    CPU_DEVICE.install()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*arguments, **keywords)
