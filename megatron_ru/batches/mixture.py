"""Which domain each training sample comes from, drawn with weights, and which of its blocks it is.

Sample n is a function of the seed and n alone: any stretch can be drawn without those before it being kept, so a
run that stops goes on exactly where it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.foundation.errors import UserError

# Draws made by one random stream.
_STREAM = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Samples of several domains. Raises UserError for weights and sizes that cannot be drawn from."""

    weights: tuple[float, ...]
    """One for each domain; only their ratios count."""
    sizes: tuple[int, ...]
    """Blocks of each domain."""
    seed: int

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sizes) or not self.weights:
            raise UserError(f"{len(self.weights)} weights were given for {len(self.sizes)} domains; give one for each")
        if min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
            raise UserError(f"the weights {self.weights} must not be negative, and one must be more than 0")
        empty = [
            n for n, (weight, size) in enumerate(zip(self.weights, self.sizes, strict=True)) if weight and not size
        ]
        if empty:
            raise UserError(f"domain number {empty[0]} has a weight and no block; drop it, or give it text")

    def domains(self, start: int, count: int) -> npt.NDArray[np.int16]:
        """The domains of samples `start` to `start + count`, int16 [count]."""
        parts = [stream[low:high] for stream, low, high in self._streams(start, start + count)]
        return np.concatenate(parts) if parts else np.empty(0, np.int16)

    def samples(self, start: int, count: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """The domains, int16 [count], and the blocks within them, int64 [count], of samples from `start`.

        A domain's blocks come in a random order; when all of them were taken it begins again, in another order.
        """
        taken = np.zeros(len(self.sizes), dtype=np.int64)
        for stream, low, high in self._streams(0, start):
            taken += np.bincount(stream[low:high], minlength=len(self.sizes))
        domains = self.domains(start, count)
        blocks = np.empty(count, dtype=np.int64)
        for domain, size in enumerate(self.sizes):
            mine = np.flatnonzero(domains == domain)
            if len(mine):
                positions = taken[domain] + np.arange(len(mine))
                for epoch in range(int(positions[0]) // size, int(positions[-1]) // size + 1):
                    inside = positions // size == epoch
                    blocks[mine[inside]] = self._order(domain, epoch)[positions[inside] % size]
        return domains, blocks

    def _streams(self, start: int, end: int) -> Iterator[tuple[npt.NDArray[np.int16], int, int]]:
        """The streams that samples [start, end) lie in, each with the stretch of it that is meant."""
        bounds = np.cumsum(np.array(self.weights, dtype=np.float64))
        bounds /= bounds[-1]
        for number in range(start // _STREAM, -(-end // _STREAM)):
            values = _generator(self.seed, 0, number).random(_STREAM)
            first = number * _STREAM
            drawn = np.searchsorted(bounds, values, side="right").astype(np.int16)
            yield drawn, max(start - first, 0), min(end - first, _STREAM)

    def _order(self, domain: int, epoch: int) -> npt.NDArray[np.int64]:
        return _generator(self.seed, 1 + domain, epoch).permutation(self.sizes[domain])


def chi_square(counts: npt.NDArray[np.integer[Any]], weights: tuple[float, ...]) -> tuple[float, int]:
    """(Pearson's statistic of `counts` against `weights`, its degrees of freedom)."""
    expected = np.array(weights, dtype=np.float64)
    expected = expected / expected.sum() * counts.sum()
    drawn = expected > 0
    return float(((counts[drawn] - expected[drawn]) ** 2 / expected[drawn]).sum()), int(drawn.sum()) - 1


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, number])))
