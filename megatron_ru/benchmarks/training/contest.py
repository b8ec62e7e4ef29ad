"""The contenders one after the other, each in a process of its own. Nothing here needs torch."""

import datetime
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import megatron_ru
from megatron_ru.benchmarks.training.contender import Contender
from megatron_ru.benchmarks.training.result import TrainingReport, TrainingRow
from megatron_ru.benchmarks.training.task import Task
from megatron_ru.foundation.errors import UserError

Start = Callable[[str, Sequence[str], Path, Mapping[str, str]], None]
"""Runs (what, command, log, environment) to its end; raises `UserError` when it fails."""


def run(
    kind: str,
    task: Task,
    contenders: Sequence[Contender],
    start: Start,
    folder: Path,
    environment: Mapping[str, str],
    command: str,
    finished: Callable[[TrainingReport], None] = lambda report: None,
) -> TrainingReport:
    """Measures all of them; `finished` gets what there is after each.

    Outputs and logs go to `folder`. A KeyboardInterrupt ends the measuring, and those not measured are `missing`.
    """
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows: list[TrainingRow] = []

    def report() -> TrainingReport:
        missing = [
            TrainingRow(contender=one.name, status="missing", ours=one.ours, note="the run was interrupted")
            for one in contenders[len(rows) :]
        ]
        return TrainingReport(kind=kind, command=command, date=date, task=task, rows=(*rows, *missing))

    folder.mkdir(parents=True, exist_ok=True)
    with suppress(KeyboardInterrupt):
        for contender in contenders:
            rows.append(_measure(contender, task, start, folder, _importable(environment)))
            finished(report())
    return report()


def _measure(
    contender: Contender, task: Task, start: Start, folder: Path, environment: Mapping[str, str]
) -> TrainingRow:
    place = "".join(character if character.isalnum() else "_" for character in contender.name)
    output, log = folder / f"{place}.json", folder / f"{place}.log"
    output.unlink(missing_ok=True)
    began = time.monotonic()
    about = {"contender": contender.name, "ours": contender.ours, "flags": shlex.join(contender.flags)}
    try:
        start(contender.name, contender.command(output), log, environment)
        document = json.loads(output.read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError) as error:
        return TrainingRow(
            status="failed", note=_reason(log, error), wall_seconds=time.monotonic() - began, **about
        )  # fmt: skip
    if "skipped" in document:
        return TrainingRow(status="skipped", note=document["skipped"], **about)
    return TrainingRow(status="ok", document=document, wall_seconds=time.monotonic() - began, **about)


def _reason(log: Path, error: Exception) -> str:
    """The line of the log that says most, else the error."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        told = [line for line in lines if "Error" in line or ": error: " in line]
        if told:
            return told[-1][:300]
    return str(error).splitlines()[0][:300]


def _importable(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a new Python finds this package, wherever it was found here."""
    here = str(Path(megatron_ru.__file__).parents[1])
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, (here, environment.get("PYTHONPATH", ""))))}
