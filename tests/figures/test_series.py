import pytest

from megatron_ru.figures.series import Series, running_mean


def test_running_mean_is_over_what_there_is():
    series = Series(name="loss", x=(1, 2, 3, 4), y=(8.0, 6.0, 1.0, 2.0))
    assert running_mean(series, 3) == Series(name="loss", x=(1, 2, 3, 4), y=(8.0, 7.0, 5.0, 3.0))
    assert running_mean(series, 1) == series


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="series loss: 2 x for 1 y"):
        Series(name="loss", x=(1, 2), y=(1.0,))
