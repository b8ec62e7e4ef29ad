"""The arithmetic of semantic deduplication: nearest centroids, and the nearest farther neighbour of each document.

SemDeDup (A. Abbas, K. Tirumala, D. Simig, S. Ganguli, A. Morcos, 2023, arXiv 2303.09540), with the rows of a cluster
streamed: X_i X^T for a slice X_i of rows. Of documents that are alike the one farthest from the centroid stays.
Products are taken in fp32, on a GPU too; what is chosen by them is computed again in fp64, so that the numbers handed
on are the same for any slice, thread count and device.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]

# Products in fp32 of normalised vectors of a thousand elements are off by less than this.
_ROUNDING = 2e-6

# Elements of one product: 64 MB.
_PRODUCT_ELEMENTS = 1 << 24


class Neighbours(NamedTuple):
    """Of each document of a cluster, in the order in which they were given."""

    largest: npt.NDArray[np.float64]
    """The largest cosine to a document that is farther from the centroid; -1 for the farthest one."""
    neighbour: npt.NDArray[np.int64]
    """That document; -1 for the farthest one."""


def normalised(vectors: npt.NDArray[Any]) -> Matrix:
    """Rows of length 1; a row of zeros stays."""
    rows = vectors.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return np.divide(rows, lengths, dtype=np.float32)


def nearest_centroids(
    vectors: Matrix, centroids: Matrix, device: str = "cpu"
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """(the centroid with the largest cosine, that cosine) of each of `vectors` [documents, dimension]; of centroids
    that are equally near the first."""
    products = _Products(centroids, device)
    found = np.empty(len(vectors), dtype=np.int32)
    wide: Any = None
    rows = max(1, _PRODUCT_ELEMENTS // len(centroids))
    for start in range(0, len(vectors), rows):
        part = slice(start, start + rows)
        found[part], unsure = products.largest(vectors[part])
        for row in start + unsure:
            # Chosen in fp64, or the device and the number of threads would choose.
            wide = centroids.astype(np.float64) if wide is None else wide
            found[row] = np.argmax(wide @ vectors[row].astype(np.float64))
    cosines = np.empty(len(vectors), dtype=np.float64)
    for start in range(0, len(vectors), 4096):
        part = slice(start, start + 4096)
        cosines[part] = np.einsum(
            "nd,nd->n", vectors[part].astype(np.float64), centroids[found[part]].astype(np.float64)
        )
    return found, cosines


def farther_neighbours(vectors: Matrix, to_centroid: npt.NDArray[np.float64], device: str = "cpu",
                       rows: int | None = None) -> Neighbours:  # fmt: skip
    """The nearest farther neighbour of each document of one cluster.

    `vectors` [documents, dimension] are normalised, `to_centroid` [documents] are their cosines to the centroid.
    Documents equally far from it are ranked by their place. `rows` of the product are held at once.
    """
    count = len(vectors)
    order = np.argsort(to_centroid, kind="stable")
    ranked = np.ascontiguousarray(vectors[order])
    largest = np.full(count, -1.0)
    neighbour = np.full(count, -1, dtype=np.int64)
    rows = rows or max(1, _PRODUCT_ELEMENTS // max(count, 1))
    products = _Products(ranked, device)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        found_rows, found_columns = products.near_largest_before(start, end)
        cosines = _exact(ranked, found_rows, found_columns)
        # The largest of each row; of equal ones the farthest from the centroid.
        best = np.lexsort((found_columns, -cosines, found_rows))
        first = best[np.unique(found_rows[best], return_index=True)[1]]
        largest[order[found_rows[first]]] = cosines[first]
        neighbour[order[found_rows[first]]] = order[found_columns[first]]
    return Neighbours(largest, neighbour)


def threshold_for(largest: npt.NDArray[np.float64], remove: float) -> float:
    """The cosine from which on documents are removed, so that the share `remove` of them is.

    As many as asked for or, where that would part equal cosines, fewer. 2 when nothing is to be removed.
    """
    wanted = round(remove * len(largest))
    candidates = np.sort(largest[largest > -1])[::-1]
    wanted = min(wanted, len(candidates))
    while 0 < wanted < len(candidates) and candidates[wanted - 1] == candidates[wanted]:
        wanted -= 1
    return float(candidates[wanted - 1]) if wanted else 2.0


class _Products:
    """Products with one matrix [columns, dimension], by numpy or, on a GPU, by torch."""

    def __init__(self, columns: Matrix, device: str) -> None:
        self._columns: Any = columns
        self._torch: Any = None
        self._device = device
        if device != "cpu":
            import torch

            self._torch = torch
            self._columns = self._tensor(columns)

    def largest(self, vectors: Matrix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(the column with the largest product, int64 [vectors]; the rows where another one is as near as rounding
        can tell)."""
        if self._torch is None:
            products = vectors @ self._columns.T
            found = products.argmax(axis=1)
            rows = np.arange(len(found))
            best = products[rows, found]
            products[rows, found] = -2
            return found, np.flatnonzero(products.max(axis=1) >= best - _ROUNDING)
        products = self._multiply(self._tensor(vectors), self._columns)
        best, found = products.max(dim=1, keepdim=True)
        products.scatter_(1, found, -2.0)
        unsure = (products.amax(dim=1, keepdim=True) >= best - _ROUNDING)[:, 0]
        return found[:, 0].cpu().numpy(), np.flatnonzero(unsure.cpu().numpy())

    def near_largest_before(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(rows, columns) of the products of rows [start, end) with earlier ones, near the largest of each row."""
        if self._torch is None:
            products = self._columns[start:end] @ self._columns[:end].T
            products[np.arange(end)[None, :] >= np.arange(start, end)[:, None]] = -2
            best = products.max(axis=1, keepdims=True)
            rows, columns = np.nonzero((products >= best - _ROUNDING) & (products > -2))
            return rows + start, columns
        torch = self._torch
        products = self._multiply(self._columns[start:end], self._columns[:end])
        later = (
            torch.arange(end, device=self._device)[None, :] >= torch.arange(start, end, device=self._device)[:, None]
        )
        products.masked_fill_(later, -2)
        best = products.amax(dim=1, keepdim=True)
        # The only wait for the GPU in a slice.
        pairs = torch.nonzero((products >= best - _ROUNDING) & (products > -2)).cpu().numpy()
        return pairs[:, 0] + start, pairs[:, 1]

    def _tensor(self, rows: Matrix) -> Any:
        # Copied: what is mapped from a file cannot be written, and from_numpy would warn of that.
        return self._torch.tensor(rows, device=self._device)

    def _multiply(self, rows: Any, columns: Any) -> Any:
        # TF32 would be off by more than _ROUNDING; the setting is the process's, so it is put back.
        before = self._torch.get_float32_matmul_precision()
        self._torch.set_float32_matmul_precision("highest")
        try:
            return rows @ columns.T
        finally:
            self._torch.set_float32_matmul_precision(before)


def _exact(vectors: Matrix, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The products of pairs of rows in fp64."""
    found = np.empty(len(rows), dtype=np.float64)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        found[part] = np.einsum(
            "nd,nd->n", vectors[rows[part]].astype(np.float64), vectors[columns[part]].astype(np.float64)
        )
    return found
