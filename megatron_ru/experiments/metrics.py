"""What a run wrote with `--ru-metrics`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ru.figures.series import Series


@dataclass(kw_only=True)
class Metrics:
    """Losses of one run, resumed or not, by iteration."""

    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    """Iteration 0 is the model before its first step."""
    step_seconds: dict[int, float] = field(default_factory=dict)
    repeated: list[tuple[int, float, float]] = field(default_factory=list)
    """(iteration, loss, loss): validations of one iteration before and after a restart."""

    def train_series(self, name: str = "training") -> Series:
        """The training losses as a curve."""
        return _series(name, self.train)

    def validation_series(self, name: str = "validation") -> Series:
        """The validation losses as a curve."""
        return _series(name, self.validation)

    def first_and_last_validation(self) -> tuple[float, float] | None:
        """The earliest and the latest validation loss; None before there are two."""
        if len(self.validation) < 2:
            return None
        return self.validation[min(self.validation)], self.validation[max(self.validation)]

    def median_step_seconds(self) -> float | None:
        """Seconds of a typical step; the first of a start pays for allocations, and saving and evaluating show too."""
        ordered = sorted(self.step_seconds.values())
        return ordered[len(ordered) // 2] if ordered else None


class MetricsReader:
    """Reads a metrics file as it grows."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = Metrics()
        self._position = 0

    def update(self) -> Metrics:
        """The metrics with the lines completed since the last call."""
        if self.path.exists():
            with self.path.open("rb") as stream:
                stream.seek(self._position)
                content = stream.read()
            # A line without its end is still being written.
            complete = content[: content.rfind(b"\n") + 1]
            self._position += len(complete)
            for line in complete.splitlines():
                _add(self.metrics, json.loads(line))
        return self.metrics


def read_metrics(path: Path) -> Metrics:
    """All of a file that may be absent."""
    return MetricsReader(path).update()


def _add(metrics: Metrics, line: dict[str, Any]) -> None:
    iteration = line["iteration"]
    if line.get("lm loss") is not None:
        metrics.train[iteration] = line["lm loss"]
        metrics.step_seconds[iteration] = line["seconds"]
    if line.get("validation lm loss") is not None:
        if iteration in metrics.validation:
            metrics.repeated.append((iteration, metrics.validation[iteration], line["validation lm loss"]))
        metrics.validation[iteration] = line["validation lm loss"]


def _series(name: str, losses: dict[int, float]) -> Series:
    steps = sorted(losses)
    return Series(name=name, x=tuple(map(float, steps)), y=tuple(losses[step] for step in steps))
