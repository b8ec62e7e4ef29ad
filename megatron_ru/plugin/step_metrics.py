"""One JSON line per logged step and one per evaluation."""

import functools
import inspect
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ru.seams.seam import Seam

_log = logging.getLogger(__name__)


class StepMetrics:
    """Writes `{"iteration", "lm loss", "learning_rate", "gradient_norm", "skipped", "seconds"}` lines, and
    `{"iteration", "validation lm loss", "seconds"}` after each evaluation (`test` instead of `validation` for the
    test set, `validation-1`, `validation-2`, ... where there are several validation sets).

    `beside` gives what else belongs into the line of a step, `training` is the module with Megatron's loop.
    The last rank writes, because it holds the loss. `seconds` is the time since the previous line. Floats carry
    every digit, so two runs can be compared bit for bit.
    """

    def __init__(
        self,
        path: str,
        every: int,
        beside: Callable[[], dict[str, int]] = dict,
        *,
        training: str = "megatron.training.training",
    ):
        self._path = Path(path)
        self._training = training
        self._every = every
        self._beside_step = beside
        self._since = time.perf_counter()
        self._evaluated: list[dict[str, float | None]] = []

    def seam(self) -> Seam:
        """The seam on Megatron's own logging, which hands out the losses after the data-parallel reduction."""
        return Seam(
            target=f"{self._training}:training_log",
            make=self._beside,
            expects=("loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm"),
            reason="Megatron offers step losses to its own writers only",
        )

    def evaluation_seams(self) -> list[Seam]:
        """The seams on evaluation: one sees the losses, the other knows the iteration and the set."""
        reason = "Megatron offers evaluation losses to its own writers only"
        return [
            Seam(target=f"{self._training}:evaluate", make=self._seeing, reason=reason),
            Seam(
                target=f"{self._training}:evaluate_and_print_results",
                make=self._reporting,
                expects=("prefix", "iteration"),
                reason=reason,
            ),
        ]

    def tell(self, line: dict[str, Any]) -> None:
        """Writes a line of another kind: `{"iteration", "startup"}` once, `{"iteration", "save_error"}` as it comes."""
        if _is_last_rank():
            self._append(line)

    def _beside(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def log(*arguments: Any, **keywords: Any) -> Any:
            given = signature.bind(*arguments, **keywords).arguments
            if given["iteration"] % self._every == 0:
                self._write_step(given)
            return original(*arguments, **keywords)

        return log

    def _seeing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            # (losses, other data, whether the time is up); no losses when it is, or on a stage before the last.
            if result[0]:
                self._evaluated.append({name: _number(value) for name, value in result[0].items()})
            return result

        return evaluate

    def _reporting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def report(*arguments: Any, **keywords: Any) -> Any:
            given = signature.bind(*arguments, **keywords).arguments
            self._evaluated.clear()
            result = original(*arguments, **keywords)
            kind = "test" if "test set" in given["prefix"] else "validation"
            losses = {
                f"{kind}{f'-{index + 1}' if len(self._evaluated) > 1 else ''} {name}": value
                for index, found in enumerate(self._evaluated)
                for name, value in found.items()
            }
            if losses:
                self._write({"iteration": given["iteration"], **losses})
            return result

        return report

    def _write_step(self, given: dict[str, Any]) -> None:
        losses = {name: _number(value) for name, value in given["loss_dict"].items()}
        self._write(
            {
                "iteration": given["iteration"],
                **losses,
                "learning_rate": _number(given["learning_rate"]),
                "gradient_norm": _number(given["grad_norm"]),
                "skipped": int(given["skipped_iter"]),
                **self._beside_step(),
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        if not _is_last_rank():
            return
        now = time.perf_counter()
        line["seconds"] = now - self._since
        self._since = now
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            # A full disk costs lines, and no training.
            _log.warning("--ru-metrics: a line for step %s is lost: %s", line.get("iteration"), error)


def _is_last_rank() -> bool:
    import torch.distributed

    return bool(torch.distributed.get_rank() == torch.distributed.get_world_size() - 1)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
