"""Where the threads of a synchronous save leave what they wrote: a queue of their own process.

Megatron takes one that other processes can reach too, for asynchronous saves; behind it is a process that imports the
program again, holds some 600 MB for each rank, and stays when its rank is killed.
"""

from queue import Queue
from typing import Any

from megatron_ru.seams.seam import Seam

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def save_result_seams() -> list[Seam]:
    """The seams on that queue, for a run whose saves are all synchronous."""
    queue: Queue[Any] = Queue()
    return [
        Seam(
            target=f"{_WRITER}:{name}",
            make=lambda original: lambda *arguments, **keywords: queue,
            reason="a synchronous save starts a process for its results",
            optional=True,
        )
        # The first is that of megatron-core 0.16.
        for name in ("_get_write_results_queue", "get_write_results_queue")
    ]
