import os

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output, requested_output


def test_output_appears_whole_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "numbers.bin"
    with atomic_output(path) as stream:
        stream.write(b"123")
        assert not path.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert path.read_bytes() == b"123"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [entry.name for entry in path.parent.iterdir()] == ["numbers.bin"]


def test_failure_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text("older", encoding="utf-8")

    def write_half():
        with atomic_output(path, "w", encoding="utf-8") as stream:
            stream.write("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text(encoding="utf-8") == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.txt"]


def test_a_file_that_the_user_named_and_nobody_can_write(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*file/a\.json: .*; nothing was kept"),
        requested_output(tmp_path / "file" / "a.json"),
    ):
        pass
