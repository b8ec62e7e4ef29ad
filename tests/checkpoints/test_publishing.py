"""A save that is cut off anywhere leaves a checkpoint that loads, and one that fails leaves nothing."""

import json
import os
import zlib

import pytest

from megatron_ru.checkpoints.background import write_and_sum
from megatron_ru.checkpoints.checksums import PIECE_BYTES, piece_sum, sum_files
from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.checkpoints.manifest import MANIFEST, read_manifest
from megatron_ru.checkpoints.publishing import abandon, begin, publish, sum_own_files
from megatron_ru.checkpoints.retention import bring_back
from tests.checkpoints.saved import FILES, content, save
from tests.checkpoints.test_selection import chosen


class Killed(BaseException):
    """The process is gone."""


def test_manifest_lists_every_file_with_its_size_and_checksum(tmp_path):
    save(tmp_path, 4)
    place = tmp_path / "iter_0000004"
    manifest = read_manifest(place)
    assert {file.path: file.bytes for file in manifest.files} == FILES
    assert manifest.iteration == 4
    assert {file.path: file.crc32 for file in manifest.files} == {
        name: (zlib.crc32((place / name).read_bytes()),) for name in FILES
    }
    assert (tmp_path / TRACKER).read_text() == "4"


def test_pieces_of_a_large_file(tmp_path):
    whole = os.urandom(1 << 20) * 3
    (tmp_path / "file").write_bytes(whole)
    size = 1_000_001
    sums = [piece_sum(tmp_path / "file", index, size) for index in range(4)]
    assert sums == [zlib.crc32(whole[index * size : (index + 1) * size]) for index in range(4)]
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(PIECE_BYTES + 1)
    (summed,) = sum_files(tmp_path, ["sparse"], threads=2)
    assert summed.crc32 == (zlib.crc32(bytes(PIECE_BYTES)), zlib.crc32(b"\0"))


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_cut_off_at_every_call_to_the_file_system(tmp_path, monkeypatch, again):
    """Before the n-th fsync, rename or replace, for every n, whatever is loaded then is whole."""
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
    iteration = 4 if again else 8
    for cut in range(100):
        folder = tmp_path / str(cut)
        save(folder, 4)
        before = content(folder / "iter_0000004")
        place = begin(folder, iteration)
        for name in FILES:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(b"new" * 99)
        left = [cut]

        def counted(name, left=left):
            def call(*arguments, **keywords):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real[name](*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                publish(folder, iteration, [], threads=1)
                done = True
            except Killed:
                done = False
        bring_back(folder)
        found = chosen(folder)
        assert found.iteration in (4, iteration)
        loaded = content(folder / f"iter_{found.iteration:07d}")
        new = dict.fromkeys(FILES, b"new" * 99)
        loaded_files = {name: loaded[name] for name in FILES}
        assert loaded_files in ({name: before[name] for name in FILES}, new)
        if done:
            assert loaded_files == new
            assert cut > len(FILES) + 5, "every file, its folder, manifest, name and tracker are synced"
            return
    raise AssertionError("it never ended")


def test_own_files_are_those_with_the_rank_s_number_and_those_it_wrote(tmp_path):
    for name in ("__1_0.distcp", "__1_1.distcp", "__11_0.distcp", "__0_0.distcp", "common.pt"):
        (tmp_path / name).write_bytes(name.encode())
    found = sum_own_files(tmp_path, 1, ["common.pt", "gone.pt"], threads=2)
    assert [file.path for file in found] == ["__1_0.distcp", "__1_1.distcp", "common.pt"]


def test_what_the_writing_process_summed_is_not_read_again(tmp_path, monkeypatch):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return "written"

    assert write_and_sum(write, str(tmp_path), 3, "__3_0.distcp", text="tensors") == "written"
    (tmp_path / "__3_0.distcp").write_text("TENSORS")
    (found,) = sum_own_files(tmp_path, 3, [], threads=1)
    assert found.crc32 == (zlib.crc32(b"tensors"),)
    assert [path.name for path in tmp_path.iterdir()] == ["__3_0.distcp"]


def test_a_torn_note_of_the_writing_process_is_passed_over(tmp_path):
    write_and_sum(lambda: (tmp_path / "__0_0.distcp").write_text("a"), str(tmp_path), 0)
    (tmp_path / ".ru_sums_0.json").write_text('[{"path": ')
    (found,) = sum_own_files(tmp_path, 0, [], threads=1)
    assert found.crc32 == (zlib.crc32(b"a"),)


def test_begin_takes_away_what_a_killed_save_left(tmp_path):
    (begin(tmp_path, 8) / "__7_0.distcp").write_text("of a larger run")
    assert list(begin(tmp_path, 8).iterdir()) == []
    abandon(tmp_path, 8)
    assert list(tmp_path.iterdir()) == []


def test_manifest_of_a_later_format_is_refused(tmp_path):
    save(tmp_path, 4)
    path = tmp_path / "iter_0000004" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    assert chosen_problem(tmp_path) == f"iter_0000004/{MANIFEST} is of format 2, this version reads 1"


def chosen_problem(folder):
    (folder / TRACKER).unlink()
    (problem,) = chosen(folder).problems
    return problem
