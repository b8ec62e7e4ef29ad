import pytest

from megatron_ru.experiments.folder import prepare_folder
from megatron_ru.foundation.errors import UserError


def test_a_new_folder_is_made_and_marked(tmp_path):
    prepare_folder(tmp_path / "a" / "b", ".mark", ["x"])
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [".mark"]


def test_only_outputs_of_an_earlier_run_are_removed(tmp_path):
    for name in (".mark", "loss.png", "mine.txt"):
        (tmp_path / name).write_text("1")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "x").write_text("1")
    prepare_folder(tmp_path, ".mark", ["loss.png", "checkpoint", "never_there"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mark", "mine.txt"]


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "loss.png").write_text("precious")
    with pytest.raises(UserError) as raised:
        prepare_folder(tmp_path, ".mark", ["loss.png"])
    assert str(raised.value) == (
        f"{tmp_path} is not empty and holds no earlier run (.mark); give an empty or a new folder"
    )
    assert (tmp_path / "loss.png").read_text() == "precious"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="f is a file, expected a folder to write to"):
        prepare_folder(tmp_path / "f", ".mark", [])
