"""One pipeline in its folder: what steps see of the config and of the steps before them."""

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_ru.data.config import PipelineConfig, parse_config
from megatron_ru.data.outcome import Outcome, write_json
from megatron_ru.data.sources import Source, find_sources
from megatron_ru.foundation.errors import UserError

_FORMAT = 1


class Run:
    """A folder with `run.json` (config, inputs, key of each step) and a folder for each step under `steps`."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.config: PipelineConfig = parse_config(description["config"])
        self.sources = [Source(**entry) for entry in description["sources"]]
        self.keys: dict[str, str] = description["keys"]
        """By name of a step: the hash of all that its files depend on."""
        self.step_names: list[str] = description["steps"]
        """In their order."""
        self._outcomes: dict[str, Outcome] = {}

    @classmethod
    def describe(cls, config: PipelineConfig) -> dict[str, Any]:
        """What `run.json` holds but for the steps and their keys. Raises UserError for inputs that are missing."""
        sources, inputs = find_sources(config)
        return {
            "format": _FORMAT, "config": asdict(config), "inputs": inputs, "sources": [asdict(s) for s in sources],
        }  # fmt: skip

    @classmethod
    @lru_cache(maxsize=4)
    def _load(cls, folder: Path, content: str) -> "Run":
        return cls(folder, json.loads(content))

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """The pipeline that lies in `folder`. Raises UserError when there is none."""
        try:
            return cls._load(Path(folder), (Path(folder) / "run.json").read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"{folder} holds no pipeline (no run.json); start one with megatron-ru data run") from None

    def step_folder(self, name: str) -> Path:
        """Where a step's files lie."""
        return self.folder / "steps" / name

    def marker(self, name: str, task: int) -> Path:
        """The file that says that a task is done, and how."""
        return self.step_folder(name) / "tasks" / f"{task:06d}.json"

    def is_done(self, name: str) -> bool:
        """Whether all tasks of the step are done and summed up."""
        summary = read_marker(self.step_folder(name) / "step.json")
        return summary is not None and summary["key"] == self.keys.get(name)

    def task_is_done(self, name: str, task: int) -> bool:
        """Whether it is marked as done and its files are there."""
        found = read_marker(self.marker(name, task))
        return (
            found is not None and found["key"] == self.keys[name] and self._are_there(name, found["outcome"]["files"])
        )

    def has_files(self, name: str) -> bool:
        """Whether the files of a step that is done are there, of their sizes."""
        return self._are_there(name, self.outcome(name).files)

    def _are_there(self, name: str, files: list[dict[str, Any]]) -> bool:
        folder = self.step_folder(name)
        return all(_size(folder / entry["name"]) == entry["bytes"] for entry in files)

    def close(self, name: str, tasks: int) -> Outcome:
        """Sums up a step whose tasks are all done. Raises UserError naming the first that is not."""
        total = Outcome()
        for task in range(tasks):
            found = read_marker(self.marker(name, task))
            if found is None or found["key"] != self.keys[name]:
                raise UserError(f"task {task} of {tasks} of the step {name} is not done; run the pipeline again")
            total.add(Outcome.from_json(found["outcome"]))
        write_json(
            self.step_folder(name) / "step.json",
            {"key": self.keys[name], "tasks": tasks, "outcome": total.to_json()},
        )
        self._outcomes[name] = total
        return total

    def outcome(self, name: str) -> Outcome:
        """The sum of a step that is done."""
        if name not in self._outcomes:
            found = read_marker(self.step_folder(name) / "step.json")
            if found is None or found["key"] != self.keys.get(name):
                raise UserError(f"the step {name} of {self.folder} is not done; run the pipeline again")
            self._outcomes[name] = Outcome.from_json(found["outcome"])
        return self._outcomes[name]

    def files(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """The files of a step that have these details, each with its `path`, in the order of tasks."""
        folder = self.step_folder(name)
        return [
            {**entry, "path": folder / entry["name"]}
            for entry in self.outcome(name).files
            if all(entry.get(key) == value for key, value in wanted.items())
        ]

    def last_step_with(self, kind: str) -> str:
        """The last step whose files are of this kind: `shard` for text."""
        for name in reversed(self.step_names):
            if self.is_done(name) and any(entry.get("kind") == kind for entry in self.outcome(name).files):
                return name
        raise UserError(f"no step of {self.folder} left a file of the kind {kind}: every document was dropped")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def read_marker(path: Path) -> dict[str, Any] | None:
    """What a task or a step left about itself; None also where that is damaged: then it is not done."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"key", "outcome"} <= found.keys() else None
