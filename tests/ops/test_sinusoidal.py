"""The table of sines and cosines."""

import math

import pytest
import torch

from megatron_ru.ops.sinusoidal import sinusoidal_table


@pytest.mark.parametrize(("length", "hidden"), [(1, 1), (5, 7), (40, 64), (0, 8)])
def test_every_entry_by_the_formula(length, hidden):
    table = sinusoidal_table(length, hidden, torch.float64)
    assert table.shape == (length, hidden)
    for position in range(length):
        for column in range(hidden):
            angle = position / 10000 ** (2 * (column // 2) / hidden)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-12)


def test_rounded_once_from_fp64():
    wide = sinusoidal_table(3000, 32, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(sinusoidal_table(3000, 32, dtype), wide.to(dtype))
    assert sinusoidal_table(2, 4).dtype == torch.float32


def test_a_shift_is_the_same_rotation_everywhere():
    # What the positions were made for: the product of two rows depends on their distance alone.
    table = sinusoidal_table(100, 64, torch.float64)
    products = table @ table.T
    for distance in (0, 1, 17):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal))
