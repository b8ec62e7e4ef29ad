from megatron_ru.figures.series import Series
from megatron_ru.figures.terminal_plot import terminal_plot


def test_a_falling_line_goes_from_corner_to_corner():
    shown = terminal_plot([Series(name="loss", x=(0, 9), y=(8.0, 2.0))], width=4, height=3, x_label="s")
    # 8 by 12 dots: the diagonal takes three of them down for two to the right.
    assert shown.split("\n") == ["8.00 ┤⠱⡀", "5.00 ┤ ⠘⡄", "2.00 ┤  ⠈⢆", "     └────", "      0s 9", "⠒ loss"]


def test_points_of_further_series_are_marked_over_the_line():
    train = Series(name="training", x=(0, 10), y=(8.0, 4.0))
    validation = Series(name="validation", x=(0, 10), y=(4.0, 8.0))
    lines = terminal_plot([train, validation], width=10, height=4).split("\n")
    assert lines[0] == "8.00 ┤⠑⠤⡀      ●"
    assert lines[3] == "4.00 ┤●      ⠈⠒⢄"
    assert lines[-1] == "⠒ training  ● validation"


def test_a_single_point_stands_in_the_middle():
    lines = terminal_plot([Series(name="a", x=(1,), y=(5.0,))], width=5, height=3).split("\n")
    assert lines[:3] == ["5.00 ┤", "5.00 ┤  ⠐", "5.00 ┤"]


def test_nothing_to_draw():
    assert terminal_plot([Series(name="a", x=(), y=())]) == ""
