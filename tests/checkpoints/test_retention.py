"""Which checkpoints go when a new one is saved, and what a start removes."""

import pytest

from megatron_ru.checkpoints.layout import asides, iterations, place_aside
from megatron_ru.checkpoints.publishing import begin
from megatron_ru.checkpoints.retention import bring_back, outdated, put_outdated_aside, remove_aside, sweep
from tests.checkpoints.saved import flip, save


@pytest.mark.parametrize(
    ("present", "whole", "newest", "keep", "keep_every", "gone"),
    [
        ([4, 8, 12], [4, 8, 12], 12, 1, None, [4, 8]),
        ([4, 8, 12], [4, 8, 12], 12, 2, None, [4]),
        ([4, 8, 12], [4, 8, 12], 12, 5, None, []),
        ([4, 8, 12, 16], [4, 8, 12, 16], 16, 1, 8, [4, 12]),
        # A damaged one does not count as one of the two.
        ([4, 8, 12], [4, 12], 12, 2, None, []),
        ([2, 4, 8, 12], [2, 4, 12], 12, 2, None, [2]),
        # A run that went back to 8 keeps what lies ahead of it.
        ([4, 8, 96, 100], [4, 8, 96, 100], 8, 1, None, [4]),
        # Never the one that was just saved.
        ([4, 8], [4], 8, 1, None, []),
    ],
)
def test_outdated(present, whole, newest, keep, keep_every, gone):
    assert outdated(present, whole, newest, keep, keep_every) == gone


def test_what_goes_loses_its_name_first(tmp_path):
    save(tmp_path, 4, 8, 12)
    assert put_outdated_aside(tmp_path, 12, 1, None) == [4, 8]
    assert iterations(tmp_path) == [12]
    assert {left.kind for left in asides(tmp_path)} == {"removed"}
    remove_aside(tmp_path)
    assert asides(tmp_path) == []


def test_a_link_stays(tmp_path):
    save(tmp_path, 4, 8)
    (tmp_path / "iter_0000004").rename(tmp_path / "elsewhere")
    (tmp_path / "iter_0000004").symlink_to(tmp_path / "elsewhere")
    assert put_outdated_aside(tmp_path, 8, 1, None) == []
    assert (tmp_path / "elsewhere" / "__0_0.distcp").exists()


def test_start_removes_what_killed_saves_left_and_says_so(tmp_path):
    save(tmp_path, 4, 8)
    (begin(tmp_path, 12) / "__0_0.distcp").write_text("half")
    for number in (2, 16):  # Megatron's own, killed: no metadata.json.
        (tmp_path / f"iter_{number:07d}").mkdir()
        (tmp_path / f"iter_{number:07d}" / "__0_0.distcp").write_text("half")
    flip(tmp_path / "iter_0000004" / "__0_0.distcp", 1)
    assert sweep(tmp_path, 8) == [
        "removed .iter_0000012.saving, which a killed save left unfinished",
        "removed iter_0000002, which a killed save left unfinished",
    ]
    assert iterations(tmp_path) == [4, 8, 16], "damaged ones, and those after what is loaded, are the user's"
    assert asides(tmp_path) == []


def test_what_was_about_to_be_replaced_comes_back(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "iter_0000004").rename(place_aside(tmp_path, 4, "replaced"))
    assert bring_back(tmp_path) == [4]
    assert bring_back(tmp_path) == []
    assert iterations(tmp_path) == [4]
