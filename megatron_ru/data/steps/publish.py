"""Datasets as Megatron reads them: PREFIX.bin and .idx in the pipeline's folder, PREFIX.packed.json beside blocks.

With a mixture there are `train` and `valid`; without, one of each for every domain, to be blended by Megatron.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_ru.batches.packed import PackedDataset, write_packed
from megatron_ru.data.outcome import Outcome, file_entry
from megatron_ru.data.run import Run
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.steps.pack import open_blocks, padding_of
from megatron_ru.data.steps.tokenise import SPLITS, tokenizer_of
from megatron_ru.tokens.indexed_dataset import IndexedDataset, dataset_paths, write_dataset

_BLOCKS_AT_ONCE = 256


def _datasets(run: Run) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(name, split, files that it is made of) of each dataset."""
    step, kind = ("tokenise", "ids") if run.config.packing is None else ("pack", "blocks")
    if run.config.mixture is not None:
        found = [
            ("train", "train", run.files("mixture", kind="samples")),
            ("valid", "valid", run.files(step, kind=kind, split="valid")),
        ]
    else:
        found = [
            (f"{entry.domain}_{split}", split, run.files(step, kind=kind, domain=entry.domain, split=split))
            for entry in run.config.inputs
            for split in SPLITS
        ]
    return [(name, split, files) for name, split, files in found if files]


def _run(run: Run, task: int) -> Outcome:
    assert run.config.tokens is not None
    name, split, files = _datasets(run)[task]
    encoder = tokenizer_of(run.config.tokens.tokenizer)
    outcome = Outcome()
    prefix = run.folder / name
    packing = run.config.packing
    with write_dataset(prefix, encoder.vocabulary_size) as writer:
        for entry in files:
            if packing is None:
                _copy_documents(entry["path"], writer)
            else:
                blocks = open_blocks(entry["path"], entry["dtype"], packing.block)
                for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
                    some = np.ascontiguousarray(blocks[start : start + _BLOCKS_AT_ONCE])
                    writer.add_documents(some.reshape(-1), np.full(len(some), packing.block, dtype=np.int32))
        documents, tokens = writer.documents, writer.tokens
    details = {"kind": "dataset", "split": split, "documents": documents, "prefix": name, "tokens": tokens}
    if packing is not None:
        real = sum(entry["tokens"] for entry in files)
        write_packed(
            prefix,
            PackedDataset(
                block=packing.block, pad=padding_of(encoder), blocks=documents, tokens=real, kind=packing.kind
            ),
        )  # fmt: skip
        outcome.files.append(_above(file_entry(prefix.with_name(f"{name}.packed.json"), kind="packed", prefix=name)))
    for path in dataset_paths(prefix):
        outcome.files.append(_above(file_entry(path, **details)))
    outcome.counts[f"{name}_documents"] = documents
    outcome.counts[f"{name}_tokens"] = tokens
    return outcome


def _above(entry: dict[str, Any]) -> dict[str, Any]:
    """Named from the step's folder, as all files are."""
    return entry | {"name": f"../../{entry['name']}"}


def _copy_documents(path: Path, writer: Any) -> None:
    dataset = IndexedDataset(str(path)[: -len(".bin")])
    lengths = dataset.sequence_lengths
    start = 0
    for first in range(0, len(lengths), 4096):
        some = np.array(lengths[first : first + 4096])
        count = int(some.sum(dtype=np.int64))
        ids = np.fromfile(path, dtype=dataset.dtype, count=count, offset=start * dataset.dtype.itemsize)
        writer.add_documents(ids, some)
        start += count


STEPS.register("publish")(
    Step(
        place=90,
        version=1,
        wanted=lambda config: config.tokens is not None,
        settings=lambda config: config.packing and config.packing.block,
        tasks=lambda run: len(_datasets(run)),
        run=_run,
    )
)
