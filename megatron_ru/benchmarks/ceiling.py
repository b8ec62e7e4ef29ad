"""What memory gives at best: the speed of a large copy."""

import time

import torch

# Far beyond any cache, and long enough that starting it does not count.
_CUDA_BYTES = 4 * 2**30
_CPU_BYTES = 256 * 2**20


def copy_ceiling(device: str, repeats: int = 10) -> float:
    """GB/s (10⁹) of the fastest of several copies within the device's memory, bytes read and bytes written."""
    size = _CUDA_BYTES if device == "cuda" else _CPU_BYTES
    # Random: memory that compresses, or whose bits do not change, may look faster than it is.
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(_seconds(source, target) for _ in range(repeats))
    return 2 * size / seconds / 1e9


def _seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    if not source.is_cuda:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
