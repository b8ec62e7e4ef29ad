"""A vector for each document: by a sentence-transformers model in a folder, or from a .npy that is there already."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ru.data.outcome import Outcome, file_entry
from megatron_ru.data.run import Run
from megatron_ru.data.semantic import normalised
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.vectors import text_shards, write_array
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require
from megatron_ru.text.jsonl import text_of


def _run(run: Run, task: int) -> Outcome:
    settings = run.config.semantic_dedup
    assert settings is not None
    shards = text_shards(run)
    shard = shards[task]
    if settings.embeddings is not None:
        vectors = _given(settings.embeddings, shards, task)
    else:
        assert settings.encoder is not None
        with shard["path"].open("rb") as stream:
            texts = [text_of(line, run.config.text_field)[: settings.characters] for line in stream]
        model = _model(settings.encoder, settings.device)
        vectors = np.asarray(model.encode(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True))
    outcome = Outcome()
    path = run.step_folder("embed") / f"{task:06d}.npy"
    write_array(path, normalised(vectors))
    outcome.files.append(file_entry(path, kind="vectors", documents=len(vectors)))
    outcome.counts["documents"] = len(vectors)
    return outcome


def _given(path: str, shards: list[dict[str, Any]], task: int) -> Any:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the embeddings {path}: {error}") from None
    documents = sum(shard["documents"] for shard in shards)
    if found.ndim != 2 or len(found) != documents:
        raise UserError(
            f"{path} has the shape {list(found.shape)}, expected [{documents}, dimension]: a vector for each document "
            "of steps/texts, in the order of the shards"
        )
    start = sum(shard["documents"] for shard in shards[:task])
    return found[start : start + shards[task]["documents"]]


@lru_cache(maxsize=1)
def _model(path: str, device: str) -> Any:
    if not os.path.isdir(path):
        raise UserError(f"the encoder {path} is no folder; give that of a sentence-transformers model")
    library = require("sentence_transformers", "semantic deduplication with an encoder", "dedup")
    return library.SentenceTransformer(path, device=device, local_files_only=True)


def _settings(config: Any) -> Any:
    from megatron_ru.data.sources import fingerprint

    settings = config.semantic_dedup
    if settings.embeddings is not None:
        return ["given", fingerprint(settings.embeddings)]
    files = sorted(path for path in Path(settings.encoder).rglob("*") if path.is_file())
    return ["encoder", [fingerprint(str(path)) for path in files], settings.characters]


STEPS.register("embed")(
    Step(
        place=40,
        version=1,
        wanted=lambda config: config.semantic_dedup is not None,
        settings=_settings,
        tasks=lambda run: len(text_shards(run)),
        run=_run,
    )
)
