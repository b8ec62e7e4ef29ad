"""A module in place of another."""

import math

from megatron_ru.seams.stand_in import stand_in


def test_what_is_not_given_is_the_originals():
    seen = stand_in(math)
    seen.pi = 3
    assert (seen.pi, seen.e, seen.__name__) == (3, math.e, "math")
    assert math.pi > 3
