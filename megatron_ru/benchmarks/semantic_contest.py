"""How long nearest centroids and nearest farther neighbours take, on the CPU and on a GPU.

    python -m megatron_ru.benchmarks.semantic_contest --documents 2500000 --clusters 11000 --device cuda

Vectors are drawn around as many directions as there are clusters; these directions are the centroids.
"""

import argparse
import itertools
import time

import numpy as np

from megatron_ru.data.semantic import Matrix, farther_neighbours, nearest_centroids, normalised

_PART = 50_000


def vectors_around(centroids: Matrix, documents: int, seed: int) -> Matrix:
    """`documents` normalised vectors [documents, dimension], each around one of the centroids."""
    generator = np.random.default_rng(seed)
    found = np.empty((documents, centroids.shape[1]), dtype=np.float32)
    for start in range(0, documents, _PART):
        end = min(start + _PART, documents)
        noise = generator.standard_normal((end - start, centroids.shape[1]), dtype=np.float32)
        chosen = centroids[generator.integers(0, len(centroids), end - start)]
        found[start:end] = normalised(chosen + 2.7 / np.sqrt(centroids.shape[1]) * noise)
    return found


def measure(vectors: Matrix, centroids: Matrix, device: str) -> dict[str, float]:
    """Wall and processor seconds of both parts, and a sum that is the same on every device."""
    began, spent = time.monotonic(), time.process_time()
    clusters, cosines = nearest_centroids(vectors, centroids, device)
    assigned, assigned_spent = time.monotonic(), time.process_time()
    order = np.argsort(clusters, kind="stable")
    bounds = np.searchsorted(clusters[order], np.arange(len(centroids) + 1))
    largest = np.full(len(vectors), -1.0)
    for first, last in itertools.pairwise(bounds):
        members = order[first:last]
        if len(members):
            largest[members] = farther_neighbours(vectors[members], cosines[members], device).largest
    return {
        "assign_seconds": assigned - began, "assign_cpu_seconds": assigned_spent - spent,
        "neighbours_seconds": time.monotonic() - assigned,
        "neighbours_cpu_seconds": time.process_time() - assigned_spent,
        "documents_per_cpu_second": len(vectors) / (time.process_time() - spent),
        "sum_of_largest": float(largest.sum()),
    }  # fmt: skip


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    generator = np.random.default_rng(1)
    centroids = normalised(generator.standard_normal((arguments.clusters, arguments.dimension)))
    vectors = vectors_around(centroids, arguments.documents, 2)
    # The device is started, and its libraries loaded, before anything is measured.
    measure(vectors[:2000], centroids[:10], arguments.device)
    for name, value in measure(vectors, centroids, arguments.device).items():
        print(f"{name}: {value:.6f}" if "sum" in name else f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
