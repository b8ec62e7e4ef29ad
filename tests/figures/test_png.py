import subprocess
import sys

import pytest

from megatron_ru.figures.png import write_bars, write_curve_panels, write_curves, write_stacked_bars
from megatron_ru.figures.series import Series

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def settings_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))


def colours(path):
    """The set of colours in an image, as (red, green, blue) in 0 to 255."""
    import matplotlib.image

    pixels = (matplotlib.image.imread(path)[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    return set(map(tuple, pixels))


def test_curves_and_points_are_drawn_in_colours_of_their_own(tmp_path):
    line = Series(name="training", x=(1, 2, 3), y=(8.0, 6.0, 5.0))
    write_curves(tmp_path / "a.png", "loss", lines=[line], points=[Series(name="validation", x=(0, 3), y=(8.1, 5.2))])
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    # Matplotlib's first two colours.
    assert {(31, 119, 180), (255, 127, 14)} <= colours(tmp_path / "a.png")


def test_missing_values_leave_a_gap_and_not_an_error(tmp_path):
    write_bars(tmp_path / "b.png", "losses", {"published": {"a": None, "b": 2.2}, "here": {"a": 5.0, "b": 4.0}})
    assert (31, 119, 180) in colours(tmp_path / "b.png")


def test_missing_matplotlib_is_one_sentence_and_leaves_no_folder(tmp_path):
    program = (
        "import sys, importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'matplotlib' else found(name, *rest)\n"
        "sys.modules['matplotlib'] = None\n"
        "from megatron_ru.commands.main import main\n"
        f"sys.exit(main(['demo', '--output', {str(tmp_path / 'out')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "megatron-ru: error: drawing figures needs the Python package 'matplotlib', which is not installed: "
        "pip install 'megatron-ru[demo]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_stacked_bars(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.barh

    def barh(self, places, widths, **settings):
        drawn.append((settings["label"], list(widths), list(settings["left"])))
        return original(self, places, widths, **settings)

    monkeypatch.setattr(Axes, "barh", barh)
    write_stacked_bars(
        tmp_path / "bars.png", "title", "ms", {"ours": {"a": 3.0, "b": 1.0}, "theirs": {"a": 2.0, "c": 4.0}}
    )
    # A part that a row lacks takes no room in it.
    assert drawn == [
        ("a", [3.0, 2.0], [0.0, 0.0]), ("b", [1.0, 0.0], [3.0, 2.0]), ("c", [0.0, 4.0], [4.0, 2.0]),
    ]  # fmt: skip
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_panels_of_curves_share_their_colours_and_names(tmp_path):
    curves = [
        Series(name="bpe", x=(10_000.0, 120_000.0), y=(3.0, 4.0)), Series(name="unigram", x=(500.0,), y=(2.0,)),
    ]  # fmt: skip
    write_curve_panels(tmp_path / "out" / "a.png", "Sizes", {"rises": curves, "falls": curves[::-1]}, "ids")
    # The first two colours of the cycle, one for each name in both panels, and no third.
    drawn = colours(tmp_path / "out" / "a.png")
    assert {(31, 119, 180), (255, 127, 14)} <= drawn
    assert (44, 160, 44) not in drawn
