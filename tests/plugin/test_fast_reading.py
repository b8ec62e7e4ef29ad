"""Our reader gives what torch's gives."""

import functools
from argparse import Namespace

import pytest
import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    load,
    save,
)

from megatron_ru.plugin import fast_reading
from megatron_ru.plugin.fast_reading import fast_reading_seams, read_data


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of tensors of many kinds and an object, and what it holds."""
    torch.manual_seed(1)
    content = {
        "matrix": torch.randn(64, 33),
        "half": torch.randn(5, 7).bfloat16(),
        "transposed": torch.randn(9, 4).t(),
        "number": torch.tensor(3.5),
        "numbers": torch.arange(10),
        "object": Namespace(step=7, name="ru"),
    }
    save(dict(content), storage_writer=FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved", content


def reader_of(folder, threads=2):
    reader = FileSystemReader(folder)
    reader.read_data = functools.partial(read_data, reader, threads)
    return reader


def empty(content):
    return {name: torch.full_like(value, 9) if torch.is_tensor(value) else None for name, value in content.items()}


def assert_same(found, content):
    assert found.keys() == content.keys()
    for name, value in content.items():
        if torch.is_tensor(value):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value


@pytest.mark.parametrize("threads", [1, 3])
def test_everything_is_what_was_saved(saved, threads):
    folder, content = saved
    found = empty(content)
    places = {name: value.data_ptr() for name, value in found.items() if torch.is_tensor(value)}
    load(found, storage_reader=reader_of(folder, threads), no_dist=True)
    assert_same(found, content)
    # Into the tensors that were given.
    assert {name: found[name].data_ptr() for name in places} == places


def test_numbers_of_another_type_are_converted(saved):
    folder, content = saved
    found = {"matrix": torch.zeros(64, 33, dtype=torch.bfloat16), "half": torch.zeros(5, 7)}
    load(found, storage_reader=reader_of(folder), no_dist=True)
    assert torch.equal(found["matrix"], content["matrix"].bfloat16())
    assert torch.equal(found["half"], content["half"].float())


def test_targets_with_gaps_are_filled(saved):
    folder, content = saved
    memory = torch.zeros(64, 66)
    load({"matrix": memory[:, ::2]}, storage_reader=reader_of(folder), no_dist=True)
    assert torch.equal(memory[:, ::2], content["matrix"])
    assert not memory[:, 1::2].any()


class Cutting(DefaultLoadPlanner):
    """Wants a part of the matrix, as a rank of another layout does."""

    def __init__(self, rows, columns):
        super().__init__()
        self.rows, self.columns = rows, columns
        self.target = torch.full((rows[1], columns[1]), 9.0)
        self.committed = []

    def create_local_plan(self):
        plan = super().create_local_plan()
        for item in plan.items:
            object.__setattr__(item, "storage_offsets", torch.Size((self.rows[0], self.columns[0])))
            object.__setattr__(item, "lengths", torch.Size((self.rows[1], self.columns[1])))
        return plan

    def resolve_tensor(self, item):
        return self.target

    def commit_tensor(self, item, tensor):
        self.committed.append(tensor)


@pytest.mark.parametrize(
    ("rows", "columns", "straight"),
    [((10, 20), (0, 33), 1), ((10, 1), (4, 5), 1), ((0, 64), (8, 3), 0), ((3, 2), (1, 30), 0)],
)
def test_parts_are_cut_out(saved, monkeypatch, rows, columns, straight):
    folder, content = saved
    counted = []
    copy_parts = fast_reading.copy_parts
    monkeypatch.setattr(
        fast_reading, "copy_parts", lambda parts, threads: counted.extend(parts) or copy_parts(parts, threads=threads)
    )
    planner = Cutting(rows, columns)
    load({"matrix": torch.zeros(64, 33)}, storage_reader=reader_of(folder), planner=planner, no_dist=True)
    expected = content["matrix"][rows[0] : sum(rows), columns[0] : sum(columns)]
    assert torch.equal(planner.target, expected)
    assert planner.committed[0] is not None
    assert len(counted) == straight


def test_megatron_gets_our_reader_and_others_keep_theirs(tmp_path):
    (seam,) = fast_reading_seams(3)

    class Other(FileSystemReader):
        def read_data(self, plan, planner):
            return None

    ours = seam.make(lambda folder: FileSystemReader(folder))(tmp_path)
    assert ours.read_data.func is read_data
    assert ours.read_data.args == (ours, 3)
    other = seam.make(lambda folder: Other(folder))(tmp_path)
    assert "read_data" not in vars(other)
    assert seam.install()
    seam.undo()
