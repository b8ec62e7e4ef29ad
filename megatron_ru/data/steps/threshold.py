"""The cosine from which on documents are duplicates: as the config says, or such that the share it asks for goes."""

import json
from collections import Counter
from typing import Any

import numpy as np

from megatron_ru.data.config import PipelineConfig
from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import open_records
from megatron_ru.data.semantic import threshold_for
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.vectors import NEIGHBOURS


def _run(run: Run, task: int) -> Outcome:
    settings = run.config.semantic_dedup
    assert settings is not None
    files = run.files("neighbours", kind="neighbours")
    largest = np.concatenate([np.array(open_records(entry["path"], NEIGHBOURS)["largest"]) for entry in files])
    threshold = settings.threshold
    if threshold is None:
        assert settings.remove is not None
        threshold = threshold_for(largest, settings.remove)
    outcome = Outcome()
    # Cosines in hundredths, for the report.
    hundredths = np.bincount(np.clip((largest[largest > -1] * 100).astype(int), 0, 100), minlength=101)
    outcome.histograms["cosine_hundredths"] = Counter({str(n): int(c) for n, c in enumerate(hundredths) if c})
    with hashed_output(run.step_folder("threshold"), "threshold.json", outcome, kind="threshold") as stream:
        stream.write(json.dumps({"threshold": threshold}).encode())
    outcome.files[0]["threshold"] = threshold
    outcome.counts.update({"documents": len(largest), "at_or_above": int((largest >= threshold).sum())})
    return outcome


def _settings(config: PipelineConfig) -> Any:
    return config.semantic_dedup and [config.semantic_dedup.remove, config.semantic_dedup.threshold]


STEPS.register("threshold")(
    Step(
        place=44,
        version=1,
        wanted=lambda config: config.semantic_dedup is not None,
        settings=_settings,
        tasks=lambda run: 1,
        run=_run,
    )
)
