"""One JSON line per logged step."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ru.seams.seam import Seam


class StepMetrics:
    """Writes `{"iteration", "lm loss", "learning_rate", "gradient_norm", "skipped", "seconds"}` lines.

    The last rank writes, because it holds the loss. `seconds` is the time since the previous line. Floats carry
    every digit, so two runs can be compared bit for bit.
    """

    def __init__(self, path: str, every: int):
        self._path = Path(path)
        self._every = every
        self._since = time.perf_counter()

    def seam(self) -> Seam:
        """The seam on Megatron's own logging, which hands out the losses after the data-parallel reduction."""
        return Seam(
            target="megatron.training.training:training_log",
            make=self._beside,
            expects=("loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm"),
            reason="Megatron offers step losses to its own writers only",
        )

    def _beside(self, original: Callable[..., Any]) -> Callable[..., Any]:
        import inspect

        signature = inspect.signature(original)

        def log(*arguments: Any, **keywords: Any) -> Any:
            given = signature.bind(*arguments, **keywords).arguments
            if given["iteration"] % self._every == 0:
                self._write(given)
            return original(*arguments, **keywords)

        return log

    def _write(self, given: dict[str, Any]) -> None:
        import torch.distributed

        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        losses = {name: _number(value) for name, value in given["loss_dict"].items()}
        now = time.perf_counter()
        line = {
            "iteration": given["iteration"],
            **losses,
            "learning_rate": _number(given["learning_rate"]),
            "gradient_norm": _number(given["grad_norm"]),
            "skipped": int(given["skipped_iter"]),
            "seconds": now - self._since,
        }
        self._since = now
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
