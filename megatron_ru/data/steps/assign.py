"""The cluster of each document."""

import numpy as np

from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.semantic import nearest_centroids
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.vectors import ASSIGNED, open_vectors, text_shards


def _run(run: Run, task: int) -> Outcome:
    settings = run.config.semantic_dedup
    assert settings is not None
    centroids = np.load(run.files("centroids", kind="centroids")[0]["path"])
    vectors = np.ascontiguousarray(open_vectors(run)[task])
    if settings.clustering == "hdbscan":
        start = sum(entry["documents"] for entry in text_shards(run)[:task])
        labels = np.load(run.files("centroids", kind="labels")[0]["path"], mmap_mode="r")
        clusters = np.array(labels[start : start + len(vectors)])
        cosines = np.einsum("nd,nd->n", vectors.astype(np.float64), centroids[clusters].astype(np.float64))
    else:
        clusters, cosines = nearest_centroids(vectors, centroids, settings.device)
    records = np.empty(len(vectors), dtype=ASSIGNED)
    order = np.argsort(clusters, kind="stable")
    records["cluster"], records["row"], records["cosine"] = clusters[order], order, cosines[order]
    outcome = Outcome()
    with hashed_output(run.step_folder("assign"), f"{task:06d}.assigned", outcome, kind="assigned") as stream:
        stream.write(records.tobytes())
    outcome.counts["documents"] = len(records)
    return outcome


STEPS.register("assign")(
    Step(
        place=42,
        version=2,
        wanted=lambda config: config.semantic_dedup is not None,
        settings=lambda config: None,
        tasks=lambda run: len(text_shards(run)),
        run=_run,
    )
)
