"""Processes that encode batches, and give them back in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import TracebackType

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokens.batch_encoding import Batch, Encoded, TokeniseSettings, encode_batch
from megatron_ru.tokens.encoding import Encoder, load_encoder

type Encode = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Encoded]]]
"""Batches to batches with their encodings, in the same order."""


class WorkerPool:
    """Processes that encode. A pool that loses one of them fails at once, it does not wait."""

    def __init__(self, tokenizer_path: str, settings: TokeniseSettings) -> None:
        self._settings = settings
        # Spawned, not forked: the caller may have threads, and a copy of their locks would hang.
        self._executor = ProcessPoolExecutor(
            settings.workers, get_context("spawn"), _start_worker, (tokenizer_path, settings)
        )

    def __enter__(self) -> Encode:
        return self._run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        under_way: deque[tuple[Batch, Future[Encoded]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, self._executor.submit(_encode_in_worker, batch)))
                if len(under_way) > 2 * self._settings.workers + 1:
                    first, encoded = under_way.popleft()
                    yield first, encoded.result()
            while under_way:
                first, encoded = under_way.popleft()
                yield first, encoded.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died before its work was done (killed, or out of memory); nothing was "
                f"kept: run it again, with fewer --workers than {self._settings.workers} if memory was short"
            ) from None


_worker: tuple[Encoder, TokeniseSettings] | None = None


def _start_worker(tokenizer_path: str, settings: TokeniseSettings) -> None:
    """Loads the tokenizer once for each worker, and ends the worker when its parent is gone."""
    global _worker
    # Ctrl-C reaches the whole group; the parent cleans up, and two dozen tracebacks would hide why.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _worker = load_encoder(tokenizer_path, fast=settings.fast), settings


def _end_with(sentinel: int) -> None:
    # A worker whose parent was killed would wait for work for ever: it holds both ends of its own queue.
    connection.wait([sentinel])
    os._exit(1)


def _encode_in_worker(batch: Batch) -> Encoded:
    assert _worker is not None
    return encode_batch(*_worker, batch)
