"""Shards without the documents that mean what a farther one of their cluster means."""

import numpy as np

from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import open_records
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.vectors import NEIGHBOURS, text_shards
from megatron_ru.text.jsonl import text_of


def _run(run: Run, task: int) -> Outcome:
    shard = text_shards(run)[task]
    threshold = run.files("threshold", kind="threshold")[0]["threshold"]
    parts = []
    for entry in run.files("neighbours", kind="neighbours"):
        records = open_records(entry["path"], NEIGHBOURS)
        first, last = np.searchsorted(records["shard"], [task, task + 1])
        parts.append(np.array(records[first:last]))
    mine = np.concatenate(parts)
    mine = mine[np.argsort(mine["row"], kind="stable")]
    assert np.array_equal(mine["row"], np.arange(shard["documents"]))
    drop = mine["largest"] >= threshold
    outcome, written = Outcome(), Outcome()
    folder, name = run.step_folder("semantic_dedup"), shard["name"]
    with (
        shard["path"].open("rb") as lines,
        hashed_output(folder, name, written, kind="shard", domain=shard["domain"]) as stream,
    ):
        for row, line in enumerate(lines):
            if not drop[row]:
                stream.write(line)
            elif outcome.wants_sample("alike"):
                text = text_of(line, run.config.text_field)
                twin = _text_of(run, int(mine["kept_shard"][row]), int(mine["kept_row"][row]))
                shown = f"cosine {mine['largest'][row]:.4f} | {text[:140]} | {twin[:140]}"
                outcome.drop("alike", f"{name}:{row + 1}", shown)
            else:
                outcome.dropped["alike"] += 1
    written.files[0]["documents"] = kept = int((~drop).sum())
    outcome.counts["documents"] = kept
    if kept:
        outcome.files += written.files
    else:
        (folder / name).unlink()
    return outcome


def _text_of(run: Run, shard: int, row: int) -> str:
    with text_shards(run)[shard]["path"].open("rb") as stream:
        for number, line in enumerate(stream):
            if number == row:
                return text_of(line, run.config.text_field)
    raise AssertionError(f"shard {shard} has no row {row}")


STEPS.register("semantic_dedup")(
    Step(
        place=45,
        version=1,
        wanted=lambda config: config.semantic_dedup is not None,
        settings=lambda config: None,
        tasks=lambda run: len(text_shards(run)),
        run=_run,
    )
)
