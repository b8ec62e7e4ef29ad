import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ru.batches.best_fit import best_fit_decreasing


def naive(lengths, block):
    """The same by trying every open block."""
    spaces, found = [], {}
    for piece in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fitting = [(space, -number) for number, space in enumerate(spaces) if space >= lengths[piece]]
        if fitting:
            number = -min(fitting)[1]
        else:
            number = len(spaces)
            spaces.append(block)
        spaces[number] -= lengths[piece]
        found[piece] = number
    return spaces


def test_known_packing():
    # 7 and 3, 6 and 4, 5 and 5: no space is left.
    assert best_fit_decreasing(np.array([3, 5, 7, 4, 6, 5]), 10).tolist() == [0, 1, 0, 2, 2, 1]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_no_block_overflows_and_as_few_as_the_naive_form(lengths):
    blocks = best_fit_decreasing(np.array(lengths), 16)
    filled = np.bincount(blocks, weights=lengths)
    assert filled.max() <= 16
    assert sorted(16 - filled) == sorted(naive(lengths, 16))
    first = [int(np.flatnonzero(blocks == number)[0]) for number in range(blocks.max() + 1)]
    assert first == sorted(first)


@pytest.mark.parametrize("block", [64, 4096])
def test_padding_is_below_half_a_percent(block):
    generator = np.random.default_rng(5)
    lengths = np.minimum(generator.lognormal(np.log(block / 12), 1, 20_000).astype(int) + 1, block)
    blocks = best_fit_decreasing(lengths, block)
    assert 1 - lengths.sum() / (block * (blocks.max() + 1)) < 0.005
