import numpy as np
import pytest

from megatron_ru.batches import mixture as module
from megatron_ru.batches.mixture import Mixture, chi_square
from megatron_ru.foundation.errors import UserError

WEIGHTS = (0.5, 0.3, 0.15, 0.05, 0.0)
# The quantile .999 of the distribution with three degrees of freedom.
CHI_SQUARE_3_AT_999 = 16.266
MIXTURE = Mixture(weights=WEIGHTS, sizes=(1000, 700, 12, 400, 5), seed=3)


def test_domains_are_drawn_with_the_weights():
    counts = np.bincount(MIXTURE.domains(0, 200_000), minlength=5)
    statistic, freedom = chi_square(counts, WEIGHTS)
    assert freedom == 3
    assert statistic < CHI_SQUARE_3_AT_999
    assert counts[4] == 0


def test_chi_square_notices_wrong_weights():
    counts = np.bincount(MIXTURE.domains(0, 200_000), minlength=5)
    statistic, _ = chi_square(counts, (0.49, 0.31, 0.15, 0.05, 0.0))
    assert statistic > CHI_SQUARE_3_AT_999


@pytest.mark.parametrize("start", [0, 1, 999, 65_535, 65_536, 70_001])
def test_any_stretch_can_be_drawn_by_itself(start):
    domains, blocks = MIXTURE.samples(0, 80_000)
    later = MIXTURE.samples(start, 5000)
    assert np.array_equal(later[0], domains[start : start + 5000])
    assert np.array_equal(later[1], blocks[start : start + 5000])


def test_every_block_comes_once_before_one_comes_twice():
    domains, blocks = MIXTURE.samples(0, 5000)
    for domain, size in enumerate(MIXTURE.sizes[:3]):
        mine = blocks[domains == domain]
        first = mine[:size]
        assert sorted(first) == sorted(set(first))
        assert mine.max() < size
    again = blocks[domains == 2]
    assert sorted(again[:12]) == sorted(again[12:24]) == list(range(12))
    assert again[:12].tolist() != again[12:24].tolist()


def test_seed_decides():
    other = Mixture(weights=WEIGHTS, sizes=MIXTURE.sizes, seed=4)
    assert not np.array_equal(other.domains(0, 100), MIXTURE.domains(0, 100))
    assert np.array_equal(Mixture(weights=WEIGHTS, sizes=MIXTURE.sizes, seed=3).domains(0, 100),
                          MIXTURE.domains(0, 100))  # fmt: skip


def test_nothing_drawn():
    domains, blocks = MIXTURE.samples(10, 0)
    assert len(domains) == len(blocks) == 0


def test_streams_are_smaller_than_the_test(monkeypatch):
    assert module._STREAM < 80_000


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        ((1.0,), (1, 2), "1 weights were given for 2 domains"),
        ((0.0, 0.0), (1, 2), "must not be negative"),
        ((1.0, -1.0), (1, 2), "must not be negative"),
        ((1.0, 1.0), (1, 0), "domain number 1 has a weight and no block"),
    ],
)
def test_wrong_weights(weights, sizes, message):
    with pytest.raises(UserError, match=message):
        Mixture(weights=weights, sizes=sizes, seed=1)
