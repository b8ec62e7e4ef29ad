"""Where the time goes until the first step is done."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from megatron_ru.seams.seam import Seam

PARTS = ("imports", "process_group", "build", "load", "datasets", "first_step", "other")


class StartupTimes:
    """Measures one start. When its first step is done `tell` gets the iteration and the seconds of each part.

    | part | what |
    | --- | --- |
    | imports | from the start of the process until its arguments are read: Python, torch, Megatron |
    | process_group | the ranks meet |
    | build | model and optimizer |
    | load | the checkpoint: which one is whole, and reading it |
    | datasets | index and loaders |
    | first_step | forward, backward, optimizer |
    | other | what lies between them: the tokenizer, compiled helpers, an evaluation before the first step |
    """

    def __init__(self, tell: Callable[[int, dict[str, float]], None]):
        self._tell = tell
        self._started = psutil.Process().create_time()
        self._seconds = dict.fromkeys(PARTS, 0.0) | {"imports": time.time() - self._started}
        self._open: list[str] = []
        self._done = False

    def seams(
        self, *, training: str = "megatron.training.training", initialize: str = "megatron.training.initialize"
    ) -> list[Seam]:
        """The seams of one run, on the modules `training` and `initialize`; install them after those whose time counts
        as theirs."""
        reason = "Megatron logs the time of some of these parts, and not where the rest is"
        parts = {
            f"{initialize}:_initialize_distributed": "process_group",
            f"{training}:setup_model_and_optimizer": "build",
            f"{training}:load_checkpoint": "load",
            f"{training}:build_train_valid_test_data_iterators": "datasets",
        }
        measured = [
            Seam(target=target, make=functools.partial(self._measured, part), reason=reason)
            for target, part in parts.items()
        ]
        return [*measured, Seam(target=f"{training}:train_step", make=self._first_step, reason=reason)]

    def _measured(self, part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._part(part):
                return original(*arguments, **keywords)

        return call

    def _first_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train_step(*arguments: Any, **keywords: Any) -> Any:
            if self._done:
                return original(*arguments, **keywords)
            with self._part("first_step"):
                result = original(*arguments, **keywords)
                _wait_for_device()
            self._done = True
            self._finish()
            return result

        return train_step

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """What is inside counts for `name`, and not for the part around it."""
        since = time.perf_counter()
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            seconds = time.perf_counter() - since
            self._seconds[name] += seconds
            if self._open:
                self._seconds[self._open[-1]] -= seconds

    def _finish(self) -> None:
        from megatron.training import get_args

        total = time.time() - self._started
        self._seconds["other"] = max(0.0, total - sum(self._seconds.values()))
        seconds = {f"{name}_seconds": round(value, 3) for name, value in self._seconds.items()}
        self._tell(get_args().curr_iteration + 1, {**seconds, "total_seconds": round(total, 3)})


def sentence(seconds: dict[str, float]) -> str:
    """The parts in one line for the log."""
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds[f'{name}_seconds']:.1f}" for name in PARTS)
    return f"first step done {seconds['total_seconds']:.1f} s after the start of the process: {parts}"


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
