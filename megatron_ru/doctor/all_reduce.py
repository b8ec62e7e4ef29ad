"""An all-reduce of a few ranks: whether it is right, and how long it takes."""

import importlib
import time
from datetime import timedelta
from typing import Any

# Large enough that the links count and not the start of each call; small enough for a V100 and for slow Ethernet.
CUDA_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
_MOST_TIMES = 30
_SMALL_TIMES = 20


def bus_bandwidth(ranks: int, size: int, seconds: float) -> float:
    """Bytes per second over the slowest link of a ring, 2 (n - 1) / n of the size: comparable for any n.

    As in nccl-tests, doc/PERFORMANCE.md.
    """
    return 2 * (ranks - 1) / ranks * size / seconds


def measure_all_reduce(
    *,
    address: str,
    port: int,
    meeting: str,
    rank: int,
    ranks: int,
    backend: str,
    device: int,
    limit: float,
    seconds: float = 1.0,
    size: int | None = None,
) -> dict[str, Any]:
    """`seconds` of one all-reduce of `bytes`, `latency_seconds` of one number, and whether the sums were `right`.

    Called in each of `ranks` processes, which meet in the store at `address` under the word `meeting`. Measures for
    about `seconds`. Raises what torch raises, RuntimeError and its kin, after at most `limit` seconds where gloo or
    NCCL notice it; a peer that hangs may keep NCCL for ever.
    """
    import torch

    dist: Any = importlib.import_module("torch.distributed")
    patience = timedelta(seconds=limit)
    store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
    where = torch.device("cpu")
    if backend == "nccl":
        # A scheduler may show each rank its own GPU alone.
        where = torch.device("cuda", device % torch.cuda.device_count())
        torch.cuda.set_device(where)
    dist.init_process_group(
        backend, store=dist.PrefixStore(meeting, store), rank=rank, world_size=ranks, timeout=patience
    )
    try:
        size = size or (CUDA_BYTES if backend == "nccl" else CPU_BYTES)
        right, first = _first_sum(size, rank, ranks, where)
        # All have to call equally often: the slowest one decides.
        slowest = torch.tensor([first], dtype=torch.float64, device=where)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times = max(1, min(_MOST_TIMES, int(seconds / max(float(slowest), 1e-6))))
        return {
            "seconds": _seconds_each(torch.zeros(size // 4, device=where), times),
            "latency_seconds": _seconds_each(torch.zeros(1, device=where), _SMALL_TIMES),
            "bytes": size // 4 * 4,
            "right": right,
        }
    finally:
        dist.destroy_process_group()


def _first_sum(size: int, rank: int, ranks: int, where: Any) -> tuple[bool, float]:
    """Whether rank + 1, summed over the ranks, came out everywhere, and the seconds of a second call."""
    import torch
    import torch.distributed as dist

    numbers = torch.full((size // 4,), float(rank + 1), device=where)
    dist.all_reduce(numbers)  # makes the connections, which takes longer than using them
    right = bool((numbers == ranks * (ranks + 1) / 2).all())
    return right, _seconds_each(numbers.zero_(), 1)


def _seconds_each(numbers: Any, times: int) -> float:
    import torch
    import torch.distributed as dist

    def finished() -> float:
        if numbers.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = finished()
    for _ in range(times):
        dist.all_reduce(numbers)
    return (finished() - begin) / times
