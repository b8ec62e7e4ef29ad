"""Parts of files straight into tensors, by several threads: one copy to the CPU, two to a GPU, none in between.

A thread reads into pinned memory of its own while the part that it read before is on its way to the GPU.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """Where the bytes of one tensor lie."""

    path: Path
    first: int
    """Offset in the file."""
    target: Tensor
    """Contiguous; all of it is filled."""


def copy_parts(parts: Iterable[FilePart], *, threads: int) -> None:
    """Fills the target of each part; they are complete for the current stream when this returns.

    Raises OSError where a file cannot be read or ends too early.
    """
    todo: SimpleQueue[tuple[int, str, int, Tensor]] = SimpleQueue()
    with ExitStack() as stack:
        opened: dict[Path, int] = {}
        for part in parts:
            if part.path not in opened:
                opened[part.path] = os.open(part.path, os.O_RDONLY)
                stack.callback(os.close, opened[part.path])
            whole = part.target.detach().view(-1).view(torch.uint8) if part.target.numel() else part.target[:0]
            for first in range(0, whole.numel(), CHUNK_BYTES):
                chunk = whole[first : first + CHUNK_BYTES]
                todo.put((opened[part.path], str(part.path), part.first + first, chunk))
        in_threads(lambda: _work(todo), threads)


def in_threads(work: Callable[[], None], threads: int) -> None:
    """Calls `work` in so many threads at once, and raises the first error of theirs."""
    if threads <= 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    return None


def read_into(descriptor: int, path: str, first: int, target: memoryview) -> None:
    """Fills `target` from the file. Raises OSError where it ends too early."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], first + done)
        if count == 0:
            raise OSError(f"{path} ends at byte {first + done}, expected {len(target) - done} more")
        done += count


def _work(todo: SimpleQueue[tuple[int, str, int, Tensor]]) -> None:
    staging: _Staging | None = None
    try:
        while True:
            descriptor, path, first, target = todo.get_nowait()
            if target.is_cuda:
                staging = staging or _Staging(target.device)
                with staging.copied_to(target) as memory:
                    read_into(descriptor, path, first, memory)
            else:
                read_into(descriptor, path, first, memoryview(target.numpy()))
    except Empty:
        pass
    finally:
        if staging is not None:
            staging.wait()


class _Staging:
    """Two pieces of pinned memory, which take turns."""

    def __init__(self, device: torch.device):
        # A new thread begins at the first device, and pinning memory would take some of that one.
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)
        # The targets may be in use by what was queued before.
        self._stream.wait_stream(torch.cuda.default_stream(device))
        self._pieces = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent: Sequence[torch.cuda.Event] = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    @contextmanager
    def copied_to(self, target: Tensor):  # type: ignore[no-untyped-def]
        """Memory whose content is sent to `target` afterwards."""
        turn, self._turn = self._turn, 1 - self._turn
        self._sent[turn].synchronize()
        memory = self._pieces[turn][: target.numel()]
        yield memoryview(memory.numpy())
        with torch.cuda.stream(self._stream):
            target.copy_(memory, non_blocking=True)
            self._sent[turn].record(self._stream)

    def wait(self) -> None:
        """Returns when everything has arrived."""
        self._stream.synchronize()
