"""The lines of `--ru-metrics` and the documents of `--ru-profile` that lie in a folder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megatron_ru.figures.series import Series
from megatron_ru.foundation.errors import UserError

_NOT_LOSSES = {"iteration", "seconds", "learning_rate", "gradient_norm", "skipped", "tokens_per_second",
               "tflop_s_per_gpu", "mfu", "peak_memory_gib", "nan_gradients", "nan_ranks", "nan_losses"}  # fmt: skip


@dataclass(kw_only=True)
class Records:
    """Of one run, resumed or not; a step that was made twice counts as it was made last."""

    name: str
    """Of the file, below the folder."""
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[int, float]] = field(default_factory=dict)
    """{"validation lm loss": {iteration: value}}"""
    startups: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    """What else was told: saves that failed, for example."""
    repeated: int = 0
    """Steps that a restart made again."""
    damaged: int = 0
    """Lines that could not be read."""

    def series(self, key: str, name: str | None = None, factor: float = 1.0) -> Series:
        """A number of the steps as a curve; steps without it are left out."""
        found = [(step, line[key]) for step, line in sorted(self.steps.items()) if _is_number(line.get(key))]
        return Series(
            name=name or key, x=tuple(float(step) for step, _ in found), y=tuple(factor * value for _, value in found)
        )

    def step_seconds(self) -> Series:
        """Seconds of a step: those of a line over the steps that it stands for."""
        steps = sorted(self.steps)
        found = []
        for before, step in zip([0, *steps], steps, strict=False):
            seconds = self.steps[step].get("seconds")
            if seconds is not None and before:
                found.append((float(step), float(seconds) / (step - before)))
        return Series(name="seconds of a step", x=tuple(x for x, _ in found), y=tuple(y for _, y in found))

    def total(self, key: str) -> Series:
        """The sum of a counter up to each step; a line without it counts nothing."""
        sums, values = 0.0, []
        for step in sorted(self.steps):
            sums += self.steps[step].get(key) or 0.0
            values.append(sums)
        return Series(name=key, x=tuple(float(step) for step in sorted(self.steps)), y=tuple(values))

    def losses(self) -> list[str]:
        """Names of the training losses."""
        names = {name: None for line in self.steps.values() for name, value in line.items()
                 if name not in _NOT_LOSSES and _is_number(value)}  # fmt: skip
        return list(names)

    def median(self, key: str) -> float | None:
        """Of the steps behind the first tenth, in which a run warms up."""
        values = self.series(key).y
        kept = values[len(values) // 10 :]
        return median(kept) if kept else None


def find_metrics(place: Path) -> list[Path]:
    """The metrics files in a folder and below it, or the file itself. Raises `UserError` when there is none."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{place} is no folder: give the folder of a run, or the file that --ru-metrics wrote")
    found = [path for path in sorted(place.rglob("*.jsonl")) if _holds_steps(path)]
    if not found:
        raise UserError(
            f"{place} holds no *.jsonl with training steps: train with --ru-metrics {place / 'metrics.jsonl'}"
        )
    return found


def find_profiles(place: Path) -> dict[str, dict[str, Any]]:
    """The documents of `--ru-profile` in a folder and below it, by name."""
    found = {}
    for path in sorted(place.rglob("*.json")) if place.is_dir() else []:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and "causes" in document and "step_seconds" in document:
            found[str(path.relative_to(place))] = document
    return found


def read_records(path: Path, name: str | None = None) -> Records:
    """All lines of a file; the last one may be half of one."""
    records = Records(name=name or path.name)
    for line in _lines(path, records):
        iteration = int(line["iteration"])
        if "startup" in line:
            records.startups.append((iteration, line["startup"]))
        elif "learning_rate" in line or "gradient_norm" in line:
            records.repeated += iteration in records.steps
            records.steps[iteration] = line
        else:
            values = {key: value for key, value in line.items() if key not in ("iteration", "seconds")}
            losses = {key: value for key, value in values.items() if key.startswith(("validation", "test"))}
            for key, value in losses.items():
                if _is_number(value):
                    records.evaluations.setdefault(key, {})[iteration] = value
            if values and not losses:
                records.events.append((iteration, ", ".join(f"{key}: {value}" for key, value in values.items())))
    return records


def _lines(path: Path, records: Records | None = None) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict) and isinstance(line.get("iteration"), int):
                yield line
            elif records is not None:
                records.damaged += 1


def _holds_steps(path: Path) -> bool:
    # Data sets are JSON lines too, and large: their first line is enough.
    with path.open("rb") as stream:
        first = stream.readline(1 << 16)
    try:
        line = json.loads(first)
    except ValueError:
        return False
    return isinstance(line, dict) and "iteration" in line


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
