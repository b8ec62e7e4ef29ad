"""Clusters by density, for small clean domains: UMAP to two dimensions, then HDBSCAN, whose noise is kept."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.data.semantic import Matrix, normalised
from megatron_ru.foundation.extras import require

_FEWEST = 5
"""The smallest cluster that is tried."""


def density_clusters(vectors: Matrix, wanted: int, seed: int) -> tuple[npt.NDArray[np.int32], Matrix]:
    """(cluster of each document, -1 for noise; the normalised mean of each cluster).

    `vectors` [documents, dimension]. The smallest size of a cluster is bisected until there are about `wanted`
    clusters; of those tried the nearest number counts. One thread, so that the same seed gives the same clusters.
    """
    points = _two_dimensions(vectors, seed)
    labels = _cluster(points, _FEWEST)
    low, high = _FEWEST, max(_FEWEST + 1, len(vectors) // 2)
    # More clusters than wanted: larger ones.
    while high - low > 1 and labels.max() + 1 != wanted:
        middle = (low + high) // 2
        tried = _cluster(points, middle)
        low, high = (middle, high) if tried.max() + 1 > wanted else (low, middle)
        # One at least; the number does not fall evenly.
        if tried.max() >= 0 and abs(tried.max() + 1 - wanted) < abs(labels.max() + 1 - wanted):
            labels = tried
    count = int(labels.max()) + 1
    means = np.zeros((max(count, 1), vectors.shape[1]))
    np.add.at(means, labels[labels >= 0], vectors[labels >= 0])
    return labels, normalised(means)


def _two_dimensions(vectors: Matrix, seed: int) -> npt.NDArray[np.float32]:
    umap = require("umap", "clusters by density", "dedup")
    with warnings.catch_warnings():
        # It says that a seed means one thread.
        warnings.simplefilter("ignore")
        found: npt.NDArray[np.float32] = umap.UMAP(
            n_components=2, n_neighbors=15, min_dist=0.0, metric="cosine", random_state=seed, n_jobs=1
        ).fit_transform(vectors)
    return found


def _cluster(points: npt.NDArray[np.float32], smallest: int) -> npt.NDArray[np.int32]:
    library: Any = require("fast_hdbscan", "clusters by density", "dedup")
    labels = library.HDBSCAN(min_cluster_size=smallest).fit_predict(points.astype(np.float64))
    return np.asarray(labels, dtype=np.int32)
