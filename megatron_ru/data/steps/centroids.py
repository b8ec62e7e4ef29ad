"""k-means of a sample of the vectors, by faiss, with centroids of length 1; or clusters by density of all of them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.data.density_clusters import density_clusters
from megatron_ru.data.outcome import Outcome, file_entry
from megatron_ru.data.run import Run
from megatron_ru.data.semantic import normalised
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.vectors import open_vectors, write_array
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require


def _run(run: Run, task: int) -> Outcome:
    settings = run.config.semantic_dedup
    assert settings is not None
    shards = open_vectors(run)
    documents = sum(map(len, shards))
    if documents < settings.clusters:
        raise UserError(
            f"semantic_dedup.clusters is {settings.clusters}, more than the {documents} documents; some hundred "
            "documents to a cluster are usual"
        )
    if settings.clustering == "hdbscan":
        return _by_density(run, np.concatenate(shards))
    chosen = np.arange(documents)
    if documents > settings.sample:
        generator = np.random.Generator(np.random.Philox(settings.seed))
        chosen = np.sort(generator.choice(documents, settings.sample, replace=False))
    ends = np.cumsum([len(shard) for shard in shards])
    parts = []
    for number, shard in enumerate(shards):
        first = int(ends[number]) - len(shard)
        parts.append(shard[chosen[(chosen >= first) & (chosen < ends[number])] - first])
    sample = np.concatenate(parts).astype(np.float32)
    _choose_kernels()
    faiss = require("faiss", "semantic deduplication", "dedup")
    kmeans = faiss.Kmeans(
        sample.shape[1], settings.clusters, niter=settings.iterations, seed=settings.seed, spherical=True,
        # The sample is drawn above; faiss's own limits would draw again or warn.
        min_points_per_centroid=1, max_points_per_centroid=len(sample),
    )  # fmt: skip
    kmeans.train(sample)
    outcome = Outcome()
    path = run.step_folder("centroids") / "centroids.npy"
    write_array(path, normalised(kmeans.centroids))
    outcome.files.append(file_entry(path, kind="centroids"))
    outcome.counts.update({"clusters": settings.clusters, "sample": len(sample)})
    return outcome


def _by_density(run: Run, vectors: npt.NDArray[np.float32]) -> Outcome:
    settings = run.config.semantic_dedup
    assert settings is not None
    labels, means = density_clusters(vectors, settings.clusters, settings.seed)
    outcome = Outcome()
    for name, array in (("labels", labels), ("centroids", means)):
        path = run.step_folder("centroids") / f"{name}.npy"
        write_array(path, array)
        outcome.files.append(file_entry(path, kind=name))
    outcome.counts.update({"clusters": len(means), "sample": len(vectors), "noise": int((labels < 0).sum())})
    return outcome


def _choose_kernels() -> None:
    """The OpenBLAS in faiss's wheel does not know new processors and takes its oldest kernels then, four times slower
    (measured on an AMD EPYC with AVX-512). It reads this variable when it is loaded."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return
    kind = "SkylakeX" if "avx512f" in flags else "Haswell" if "avx2" in flags else ""
    if kind:
        os.environ.setdefault("OPENBLAS_CORETYPE", kind)


def _settings(config: Any) -> Any:
    settings = config.semantic_dedup
    return [settings.clustering, settings.clusters, settings.sample, settings.iterations, settings.seed]


STEPS.register("centroids")(
    Step(
        place=41,
        version=1,
        wanted=lambda config: config.semantic_dedup is not None,
        settings=_settings,
        tasks=lambda run: 1,
        run=_run,
    )
)
