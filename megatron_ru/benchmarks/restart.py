"""How long a start takes and how much memory, fresh and from a checkpoint, for each way to build the model."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ru.benchmarks.restart_case import KINDS, SIZES, Case, Size
from megatron_ru.checkpoints.layout import name_of
from megatron_ru.foundation.errors import UserError

_SHARED_MEMORY = Path("/dev/shm")
_LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and where the checkpoint lies meanwhile."""

    size: Size
    kinds: Sequence[str] = ("cpu_fp32", "device", "meta")
    device: str
    optimizer: str
    repeat: int = 1
    """Starts of each case, of which the fastest counts."""
    folder: Path | None = None

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise UserError(f"--kinds {','.join(self.kinds)} holds an unknown way; there are {', '.join(KINDS)}")

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of the checkpoint."""
        return self.size.parameters * (2 if self.optimizer == "none" else 14)


@dataclass(kw_only=True)
class Results:
    """What was measured so far."""

    settings: Settings
    command: str
    machine: dict[str, Any]
    cases: list[dict[str, Any]] = field(default_factory=list)
    """kind, start, and what `restart_child` measured."""
    read: dict[str, Any] | None = None
    """The same bytes from the page cache to the device."""

    def case(self, kind: str, start: str) -> dict[str, Any] | None:
        """The fastest start of this kind, None where there was none."""
        found = [case for case in self.cases if (case["kind"], case["start"]) == (kind, start)]
        return min(found, key=lambda case: float(case["parts"]["total_seconds"]), default=None)

    @property
    def load_ratio(self) -> float | None:
        """Seconds in which meta's checkpoint was checked and loaded, by those of reading the same bytes."""
        loads = [case["parts"]["load_seconds"] for case in self.cases
                 if (case["kind"], case["start"]) == ("meta", "checkpoint")]  # fmt: skip
        return min(loads) / self.read["seconds"] if loads and self.read else None

    def ratio(self, kind: str, start: str, value: Callable[[dict[str, Any]], float]) -> float | None:
        """`value` of a kind by that of meta at the same start."""
        theirs, ours = self.case(kind, start), self.case("meta", start)
        return value(theirs) / value(ours) if theirs and ours and value(ours) else None

    def json(self) -> dict[str, Any]:
        """All of it, in values that JSON has."""
        size, settings = self.settings.size, self.settings
        return {
            "command": self.command,
            "machine": self.machine,
            "device": settings.device,
            "optimizer": settings.optimizer,
            "size": {"name": size.name, "layers": size.layers, "hidden": size.hidden,
                     "feed_forward": size.feed_forward, "parameters": size.parameters},
            "cases": self.cases,
            "read": self.read,
            "load_by_read": self.load_ratio,
            "by_meta": {
                f"{kind}_{start}": {
                    "seconds": self.ratio(kind, start, lambda case: case["parts"]["total_seconds"]),
                    "cpu_bytes": self.ratio(kind, start, lambda case: case["stepped"]["cpu_bytes"]),
                    "gpu_bytes": self.ratio(kind, start, lambda case: case["stepped"]["gpu_bytes"]),
                }
                for kind in settings.kinds if kind != "meta" for start in ("fresh", "checkpoint")
            },
        }  # fmt: skip


def run(settings: Settings, command: str, finished: Callable[[Results], None]) -> Results:
    """Measures everything, each start in a process of its own; `finished` is called after each of them.

    Raises `UserError` when a start fails or the checkpoint has no room.
    """
    results = Results(settings=settings, command=command, machine=_machine(settings.device))
    folder = Path(tempfile.mkdtemp(prefix="ru_restart_", dir=_place(settings)))
    try:
        _measure(results, folder, finished)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def _measure(results: Results, folder: Path, finished: Callable[[Results], None]) -> None:
    settings, saved = results.settings, folder / "saved"

    def case(kind: str, **changes: Any) -> Case:
        return Case(**{"size": settings.size, "kind": kind, "device": settings.device,
                       "optimizer": settings.optimizer, **changes})  # fmt: skip

    def start(one: Case, *, counts: bool = True) -> None:
        measured = _in_child(folder, _task(one, folder), f"{one.kind}, {one.start}")
        if counts:
            results.cases.append({"kind": one.kind, "start": one.start, **measured})
            finished(results)

    # Python's files come into the page cache, and what is compiled once is compiled.
    start(case("meta", size=SIZES["tiny"], optimizer="none"), counts=False)
    # The checkpoint has a manifest, which Megatron's own loading ignores.
    start(case("meta", save=saved), counts="meta" in settings.kinds)
    paths = sorted(str(path) for path in (saved / name_of(1)).glob("*.distcp"))
    task = {"do": "read", "device": settings.device, "paths": paths, "times": 2 + settings.repeat}
    results.read = _in_child(folder, task, "reading")
    for _ in range(settings.repeat):
        for kind in settings.kinds:
            start(case(kind, load=saved))
    for kind in settings.kinds:
        for turn in range(settings.repeat):
            if kind != "meta" or turn:
                start(case(kind))


def _task(case: Case, folder: Path) -> dict[str, Any]:
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    on_cpu = case.kind.startswith("cpu_")
    return {
        "do": "start",
        "on_cpu": on_cpu,
        "fp32": case.kind == "cpu_fp32",
        "words": case.words(metrics),
        "metrics": str(metrics),
    }


def _in_child(folder: Path, task: dict[str, Any], what: str) -> dict[str, Any]:
    path = folder / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    words = [sys.executable, "-m", "megatron_ru.benchmarks.restart_child", str(path)]
    with (folder / "log").open("w+") as log:
        code = subprocess.run(words, stdout=log, stderr=log, cwd=folder, env=_environment()).returncode
        log.seek(0)
        last = "\n".join(log.read().splitlines()[-_LAST_LINES:])
    if code:
        raise UserError(f"the start {what} ended with exit code {code}, so nothing can be compared with it:\n{last}")
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return measured


def _environment() -> dict[str, str]:
    """This one's, with this package wherever it came from and without ranks."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    package = str(Path(__file__).parents[2])
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}


def _place(settings: Settings) -> Path:
    """A folder with room for the checkpoint, in memory if there is one. Raises `UserError`."""
    needed = settings.checkpoint_bytes * 5 // 4
    candidates = [settings.folder] if settings.folder else [_SHARED_MEMORY, Path(tempfile.gettempdir()), Path.cwd()]
    room = {place: shutil.disk_usage(place).free for place in candidates if place.is_dir()}
    for place, free in room.items():
        # What lies in memory must leave some for the model.
        if free > needed * (2 if place == _SHARED_MEMORY else 1):
            return place
    found = ", ".join(f"{place} has {free / 1e9:.1f} GB" for place, free in room.items()) or "no such folder"
    raise UserError(f"a checkpoint of about {needed / 1e9:.1f} GB has no room ({found}); name a folder with --folder")


def _machine(device: str) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "gpu": _gpu() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()
