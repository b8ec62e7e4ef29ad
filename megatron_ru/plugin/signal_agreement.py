"""How all ranks come to the same answer about a signal in every step, without waiting for each other in short ones."""

import time
from typing import Any

import torch
import torch.distributed

_SLOW_MILLISECONDS = 1000
_PAUSE_MILLISECONDS = 400


class Agreement:
    """A small all-reduce (maximum) over all ranks, once in a step or in the short steps of 0.4 s.

    Its answer is read one step later, when it has long been there. In steps longer than a second, where such a delay
    would hurt and waiting does not, it is read at once. The time of the slowest rank is part of the answer, so that
    all ranks choose alike.
    """

    def __init__(self) -> None:
        self._question = _question()
        self._asked = False
        self._at_once = True
        self._pause = 1
        self._steps = 0
        self._since: float | None = None

    def ask(self, note: int) -> int:
        """The largest note of any rank, the same on all of them; 0 when none has noted anything, or when the answer
        is still to come. Notes are positive and below 2**31. To be called by all ranks in each step."""
        if self._question is None:
            return note
        self._steps += 1
        if answer := self._answer():
            return answer
        if self._steps < self._pause:
            return 0
        self._question.put(note, self._milliseconds())
        self._asked = True
        return self._answer() if self._at_once else 0

    def settle(self) -> None:
        """Waits for the answer to the last question, which nobody reads."""
        self._answer()

    def _milliseconds(self) -> int:
        """How long a step takes since the last question."""
        now = time.perf_counter()
        # Nobody knows at first: long, until it is measured.
        taken = _SLOW_MILLISECONDS if self._since is None else (now - self._since) * 1000 / self._steps
        self._since, self._steps = now, 0
        return min(int(taken), 2**31 - 1)

    def _answer(self) -> int:
        if self._question is None or not self._asked:
            return 0
        self._asked = False
        note, milliseconds = self._question.answer()
        self._at_once = milliseconds >= _SLOW_MILLISECONDS
        self._pause = max(1, _PAUSE_MILLISECONDS // max(1, milliseconds))
        return note


class _Question:
    """Two numbers of each rank, and the largest of all ranks after them."""

    def __init__(self) -> None:
        # A tensor's memory seen by numpy, which reads and writes one number ten times faster.
        self._numbers = self._memory()
        self._view = self._numbers.numpy()

    def put(self, note: int, milliseconds: int) -> None:
        self._view[0], self._view[1] = note, milliseconds
        self._start()

    def answer(self) -> tuple[int, int]:
        self._wait_for_all_reduce()
        return int(self._view[0]), int(self._view[1])

    def _memory(self) -> torch.Tensor:
        return torch.zeros(2, dtype=torch.int32, device="cpu")

    def _start(self) -> None:
        raise NotImplementedError

    # A guard that looks at stacks knows by the name that this rank waits for others.
    def _wait_for_all_reduce(self) -> None:
        raise NotImplementedError


class _GlooQuestion(_Question):
    """Over gloo, whose own threads carry it."""

    _work: Any

    def _start(self) -> None:
        self._work = torch.distributed.all_reduce(self._numbers, torch.distributed.ReduceOp.MAX, async_op=True)

    def _wait_for_all_reduce(self) -> None:
        self._work.wait()


class _NcclQuestion(_Question):
    """Over NCCL, on a stream of its own, so that neither the training's stream nor the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._there = torch.zeros(2, dtype=torch.int32, device="cuda")
        self._stream = torch.cuda.Stream()
        self._done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())

    def _memory(self) -> torch.Tensor:
        return torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=True)

    def _start(self) -> None:
        with torch.cuda.stream(self._stream):
            self._there.copy_(self._numbers, non_blocking=True)
            torch.distributed.all_reduce(self._there, torch.distributed.ReduceOp.MAX)
            self._numbers.copy_(self._there, non_blocking=True)
            self._done.record()

    def _wait_for_all_reduce(self) -> None:
        self._done.synchronize()


def _question() -> _Question | None:
    if torch.distributed.get_world_size() == 1:
        return None
    return _GlooQuestion() if torch.distributed.get_backend() == "gloo" else _NcclQuestion()
