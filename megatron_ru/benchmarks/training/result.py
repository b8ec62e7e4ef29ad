"""What the contenders measured, as a value that is written down and read again. Nothing here needs torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ru.benchmarks.training.task import ROOF, Task
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One contender."""

    contender: str
    status: str
    """`ok`, `skipped`, `failed` or `missing`: the run was cut short before it."""
    ours: bool = False
    note: str = ""
    """The reason."""
    flags: str = ""
    """Of ours, behind those of the task."""
    wall_seconds: float = 0.0
    """Of the whole process."""
    document: dict[str, Any] | None = None
    """What the process wrote: see docs/en/training_speed.md."""

    def value(self, name: str) -> float | None:
        """A number of the document, None where there is none."""
        found = (self.document or {}).get(name)
        return float(found) if isinstance(found, int | float) else None

    def cause(self, cause: str, part: str | None = None) -> float:
        """Microseconds of a step that kernels of that cause take, in one part of the step or both."""
        found = (self.document or {}).get("causes") or []
        return float(sum(one["microseconds"] for one in found
                         if one["cause"] == cause and part in (None, one["part"])))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """A whole run."""

    kind: str
    """`train` or `fused-ladder`."""
    command: str
    date: str
    """UTC, ISO 8601."""
    task: Task
    rows: tuple[TrainingRow, ...]

    @property
    def done(self) -> list[TrainingRow]:
        """Rows with numbers."""
        return [row for row in self.rows if row.status == "ok"]

    @property
    def device_name(self) -> str:
        """Of the first that measured."""
        return next((str(row.document["device_name"]) for row in self.done if row.document), "unknown")

    def best_peer(self, name: str) -> TrainingRow | None:
        """The one with the smallest value of that name; None when no peer has it."""
        peers = [row for row in self.done if not row.ours and row.contender != ROOF and row.value(name) is not None]
        return min(peers, key=lambda row: row.value(name) or 0.0, default=None)

    @property
    def roof(self) -> TrainingRow | None:
        """Matrix products and attention alone, where they were measured."""
        return next((row for row in self.done if row.contender == ROOF), None)

    def json(self) -> dict[str, Any]:
        """For a file; `from_json` makes the same report of it."""
        return {"schema": SCHEMA, **asdict(self), "rows": [asdict(row) for row in self.rows]}


def write_json(report: TrainingReport, path: Path) -> None:
    """Everything, for other programs and for `--from-json`."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(report.json(), stream, ensure_ascii=False, indent=1)
        stream.write("\n")


def read_json(path: Path) -> TrainingReport:
    """The report of such a file. Raises `UserError` when it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return TrainingReport(
            kind=found["kind"], command=found["command"], date=found["date"], task=Task(**found["task"]),
            rows=tuple(TrainingRow(**row) for row in found["rows"]),
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"--from-json {path} cannot be read ({error.strerror}): give a file that --json wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--from-json {path} holds no result of bench train: give a file that --json wrote") from error
