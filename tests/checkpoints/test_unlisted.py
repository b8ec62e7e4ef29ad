"""Checkpoints without a manifest: what can be checked is checked, and what is whole is loaded."""

import os
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_ru.checkpoints.layout import TRACKER
from tests.checkpoints.saved import flip
from tests.checkpoints.test_selection import chosen


@pytest.fixture
def distributed(tmp_path):
    """Two checkpoints in the files that megatron-core's distributed format consists of."""
    for iteration in (4, 8):
        place = tmp_path / f"iter_{iteration:07d}"
        state = {f"weight{number}": torch.randn(40, 30) for number in range(5)} | {"words": ["any", "object"]}
        dcp.save(state, checkpoint_id=place, no_dist=True)
        (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        torch.save({"args": 1}, place / "common.pt")
    (tmp_path / TRACKER).write_text("8")
    return tmp_path


@pytest.fixture
def by_rank(tmp_path):
    """Two checkpoints of the older format, TP = 2 and PP = 2."""
    for iteration in (4, 8):
        for tensor in range(2):
            for pipeline in range(2):
                place = tmp_path / f"iter_{iteration:07d}" / f"mp_rank_{tensor:02d}_{pipeline:03d}"
                place.mkdir(parents=True)
                torch.save({"model": torch.randn(50, 20)}, place / "model_optim_rng.pt")
    (tmp_path / TRACKER).write_text("8")
    return tmp_path


def only_problem(folder):
    found = chosen(folder)
    assert found.iteration == 4
    (problem,) = found.problems
    return problem


def test_whole_ones_are_loaded(distributed):
    assert chosen(distributed).iteration == 8
    assert chosen(distributed).problems == ()


def test_whole_ones_of_the_older_format_are_loaded(by_rank):
    assert chosen(by_rank).iteration == 8
    assert chosen(by_rank).problems == ()


def test_unfinished(distributed):
    (distributed / "iter_0000008" / "metadata.json").unlink()
    assert only_problem(distributed) == (
        "iter_0000008 has no metadata.json, with which Megatron ends a save: it was not finished"
    )


def test_torch_s_own_format_has_no_metadata_json(tmp_path):
    place = tmp_path / "iter_0000004"
    dcp.save({"args": [1], "weight": torch.ones(3)}, checkpoint_id=place, no_dist=True)
    assert chosen(tmp_path).iteration == 4
    os.truncate(place / "__0_0.distcp", 100)
    assert "iter_0000004/__0_0.distcp has 100 bytes, expected at least" in chosen(tmp_path).problems[0]


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt", "__0_0.distcp"])
def test_truncated(distributed, name):
    path = distributed / "iter_0000008" / name
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert f"iter_0000008/{name} " in only_problem(distributed)


def test_missing_file(distributed):
    (distributed / "iter_0000008" / "__0_0.distcp").unlink()
    assert only_problem(distributed) == "iter_0000008/__0_0.distcp is missing"


def test_a_flipped_bit_in_a_tensor_is_seen_by_torch_s_own_checksums(distributed):
    path = distributed / "iter_0000008" / "__0_0.distcp"
    numbers = path.read_bytes().index(b"weight") if b"weight" in path.read_bytes() else 0
    flip(path, 8 * max(numbers, 2000))
    assert only_problem(distributed) == ("iter_0000008/__0_0.distcp was changed (torch's own checksums differ)")


def test_a_rank_of_the_older_format_is_missing(by_rank):
    shutil.rmtree(by_rank / "iter_0000008" / "mp_rank_01_000")
    assert only_problem(by_rank) == "iter_0000008 has the files of 3 ranks, expected 4"


def test_a_rank_of_the_older_format_is_empty_or_torn(by_rank):
    path = by_rank / "iter_0000008" / "mp_rank_01_000" / "model_optim_rng.pt"
    os.truncate(path, 1000)
    assert only_problem(by_rank) == "iter_0000008/mp_rank_01_000/model_optim_rng.pt is torn"
    path.unlink()
    assert only_problem(by_rank) == "iter_0000008/mp_rank_01_000 is empty"


def test_a_flipped_bit_in_the_older_format(by_rank):
    flip(by_rank / "iter_0000008" / "mp_rank_01_001" / "model_optim_rng.pt", 8 * 2500)
    assert only_problem(by_rank) == (
        "iter_0000008/mp_rank_01_001/model_optim_rng.pt was changed (torch's own checksums differ)"
    )
