"""`pretrain_gpt --ru-data CONFIG`: the pipeline on the first rank of each node, then the words to train on it.

The others wait for its manifest. What is there already, made of the same inputs by the same settings, is taken as it
is: on a file system that all nodes share, the first node to come works and the others find its result.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ru.data.config import PipelineConfig
from megatron_ru.data.config_file import load_config
from megatron_ru.data.execution import describe
from megatron_ru.data.outcome import write_json
from megatron_ru.data.pipeline import finished_manifest, run_pipeline
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.words import value_of

FLAG = "--ru-data"
NO_TRAIN = "RUADAPT_NO_TRAIN"

_DATA_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--data-args-path",
               "--per-split-data-args-path", "--mock-data")  # fmt: skip
_POLL_SECONDS = 0.3


def prepare_data(
    words: list[str], local_rank: int, report: Callable[[str], object] = lambda line: print(line, flush=True)
) -> list[str] | None:
    """The words with the data that the pipeline of `--ru-data` made; None when RUADAPT_NO_TRAIN=1 makes that all.

    Words without the flag come back as they are. Raises UserError on every rank when the pipeline fails.
    """
    path = value_of(words, FLAG)
    ends_here = os.environ.get(NO_TRAIN, "") not in ("", "0")
    if path is None:
        if ends_here:
            raise UserError(
                f"{NO_TRAIN} is set, but there is no {FLAG} CONFIG to prepare data with; give it, or unset it"
            )
        return words
    given = [flag for flag in _DATA_FLAGS if any(word == flag or word.startswith(f"{flag}=") for word in words)]
    if given:
        raise UserError(f"{FLAG} brings the data of the run, and {given[0]} names other; drop one of them")
    config = load_config(path)
    if config.tokens is None:
        raise UserError(f"{path} makes no datasets: it has no section tokens, which names a tokenizer")
    _, keys = describe(config)
    manifest = finished_manifest(config.output, keys)
    if manifest is None:
        manifest = _make(config, keys, report) if local_rank == 0 else _wait(config, keys)
    elif local_rank == 0:
        report(f"megatron_ru: {config.output} holds the data of {path} already")
    return None if ends_here else [*words, *_data_words(words, config, manifest)]


def _make(config: PipelineConfig, keys: dict[str, str], report: Callable[[str], object]) -> dict[str, Any]:
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    began = time.monotonic()
    failed = _failure_file(config)
    with suppress(FileNotFoundError):
        failed.unlink()

    def tell(step: str, done: int, tasks: int) -> None:
        if done == tasks:
            report(f"megatron_ru: data: {step} done ({tasks} tasks, {time.monotonic() - began:.1f} s)")

    try:
        return run_pipeline(config, workers, progress=tell)
    except UserError as error:
        if "another run (" in str(error):
            # The first rank of another node, on a shared file system.
            return _wait(config, keys)
        write_json(failed, {"message": str(error)})
        raise


def _wait(config: PipelineConfig, keys: dict[str, str]) -> dict[str, Any]:
    """The manifest, once it is there."""
    began = time.time()
    while (manifest := finished_manifest(config.output, keys)) is None:
        if (message := _failure_since(began, config)) is not None:
            raise UserError(message)
        time.sleep(_POLL_SECONDS)
    return manifest


def _failure_since(began: float, config: PipelineConfig) -> str | None:
    failed = _failure_file(config)
    with suppress(OSError):
        # A second for the clocks of a file server and of this machine.
        if failed.stat().st_mtime > began - 1:
            return str(json.loads(failed.read_text(encoding="utf-8"))["message"])
    return None


def _failure_file(config: PipelineConfig) -> Path:
    return Path(config.output) / "failed.json"


def _data_words(words: list[str], config: PipelineConfig, manifest: dict[str, Any]) -> list[str]:
    """The flags that name the datasets, and what follows from them where nobody says otherwise."""
    assert config.tokens is not None
    weights = {entry.domain: entry.weight for entry in config.inputs}
    paths: dict[str, list[str]] = {"train": [], "valid": []}
    for entry in manifest["steps"]["publish"]["files"]:
        if entry["kind"] == "dataset" and entry["name"].endswith(".bin"):
            weight = weights.get(entry["prefix"].removesuffix(f"_{entry['split']}"))
            # Megatron wants a weight for each prefix or for none.
            share = entry["tokens"] if weight is None else weight * 1e6
            paths[entry["split"]] += [f"{share:.6g}", str(Path(config.output) / entry["prefix"])]
    if not paths["train"]:
        raise UserError(
            f"the pipeline left no training data in {config.output}: every document was dropped or held out"
        )
    found = []
    for split, named in paths.items():
        if named:
            found += [f"--{split}-data-path", *(named[1:] if len(named) == 2 else named)]
    if "--tokenizer-model" not in words:
        found += ["--tokenizer-model", config.tokens.tokenizer]
    if not paths["valid"]:
        # Megatron would read from a dataset that there is not, once the training is over.
        if (value_of(words, "--eval-iters") or "0") != "0":
            raise UserError(
                f"nothing of {config.output} is held out to evaluate on; set tokens.held_out, or pass --eval-iters 0"
            )
        found += ["--eval-iters", "0"]
    if config.packing is not None and "--seq-length" not in words:
        found += ["--seq-length", str(config.packing.block)]
    return found
