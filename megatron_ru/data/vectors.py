"""Where the vectors of documents lie: a .npy beside each shard, in its order."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.data.run import Run

NEIGHBOURS = np.dtype(
    [("shard", "<u4"), ("row", "<u4"), ("largest", "<f8"), ("kept_shard", "<i4"), ("kept_row", "<i4")]
)
"""The nearest farther neighbour of a document, sorted by the document; -1 for none."""

ASSIGNED = np.dtype([("cluster", "<i4"), ("row", "<u4"), ("cosine", "<f8")])
"""The cluster of a document of a shard and its cosine to the centroid, sorted by cluster."""


def text_shards(run: Run) -> list[dict[str, Any]]:
    """The shards that vectors are made of."""
    return run.files("texts", kind="shard")


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes a .npy, whole or not at all."""
    from megatron_ru.foundation.files import atomic_output

    with atomic_output(path) as stream:
        np.save(stream, array, allow_pickle=False)


def open_vectors(run: Run) -> list[npt.NDArray[np.float32]]:
    """The vectors of each shard, mapped."""
    return [np.load(entry["path"], mmap_mode="r") for entry in run.files("embed", kind="vectors")]
