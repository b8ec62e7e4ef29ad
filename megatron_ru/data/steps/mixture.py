"""The training samples in the order in which they are drawn, each from a domain chosen by the weights."""

from typing import Any

import numpy as np

from megatron_ru.batches.mixture import Mixture
from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.steps.pack import open_blocks, padding_of
from megatron_ru.data.steps.tokenise import tokenizer_of


def mixture_of(run: Run) -> Mixture:
    """The mixture that the config asks for, of the blocks that there are."""
    assert run.config.mixture is not None
    sizes = tuple(
        sum(entry["blocks"] for entry in run.files("pack", kind="blocks", domain=found.domain, split="train"))
        for found in run.config.inputs
    )
    weights = tuple(
        float(size) if found.weight is None else found.weight
        for found, size in zip(run.config.inputs, sizes, strict=True)
    )
    return Mixture(weights=weights, sizes=sizes, seed=run.config.mixture.seed)


def _samples(run: Run) -> int:
    assert run.config.mixture is not None
    wanted = run.config.mixture.samples
    return sum(mixture_of(run).sizes) if wanted is None else wanted


def _tasks(run: Run) -> int:
    assert run.config.mixture is not None
    return max(1, -(-_samples(run) // run.config.mixture.samples_per_part))


def _run(run: Run, task: int) -> Outcome:
    assert run.config.mixture is not None
    assert run.config.packing is not None
    mixture = mixture_of(run)
    part = run.config.mixture.samples_per_part
    start = task * part
    count = min(part, _samples(run) - start)
    domains, blocks = mixture.samples(start, count)
    outcome = Outcome()
    entries = [run.files("pack", kind="blocks", domain=found.domain, split="train") for found in run.config.inputs]
    parts = [[open_blocks(e["path"], e["dtype"], run.config.packing.block) for e in found] for found in entries]
    ends = [np.cumsum([len(array) for array in found]) for found in parts]
    dtype = next(e["dtype"] for found in entries for e in found)
    assert run.config.tokens is not None
    pad = padding_of(tokenizer_of(run.config.tokens.tokenizer))
    details: dict[str, Any] = {"kind": "samples", "split": "train", "blocks": count, "dtype": dtype}
    tokens = 0
    with hashed_output(run.step_folder("mixture"), f"{task:06d}.samples", outcome, **details) as stream:
        for domain, block in zip(domains.tolist(), blocks.tolist(), strict=True):
            number = int(np.searchsorted(ends[domain], block, side="right"))
            before = int(ends[domain][number - 1]) if number else 0
            sample = parts[domain][number][block - before]
            tokens += int(np.count_nonzero(sample != pad))
            stream.write(sample.tobytes())
    outcome.files[0]["tokens"] = tokens
    drawn = np.bincount(domains, minlength=len(entries))
    outcome.counts["samples"] = count
    for found, number in zip(run.config.inputs, drawn.tolist(), strict=True):
        outcome.counts[f"samples_{found.domain}"] = number
    return outcome


def _settings(config: Any) -> Any:
    return [config.mixture, [entry.weight for entry in config.inputs]]


STEPS.register("mixture")(
    Step(
        place=80,
        version=1,
        wanted=lambda config: config.mixture is not None,
        settings=_settings,
        tasks=_tasks,
        run=_run,
    )
)
