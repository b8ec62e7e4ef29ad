import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import OPTIONAL_FIELDS, TARGETS


def render(name, **fields):
    return TARGETS[name].render(JobSpec(**{"target": name, "command": ("true",), **fields}))


def test_the_targets():
    assert list(TARGETS) == ["abci-a", "abci-h", "abci-v", "local", "mpirun", "slurm", "torchrun"]
    assert {name: TARGETS[name].gpus_per_node for name in TARGETS if TARGETS[name].whole_nodes} == {
        "abci-a": 8, "abci-h": 8, "abci-v": 4,
    }  # fmt: skip


def test_optional_fields_are_fields():
    fields = JobSpec.__dataclass_fields__.keys()
    assert OPTIONAL_FIELDS.keys() <= fields
    for _, target in TARGETS.items():
        assert target.takes <= OPTIONAL_FIELDS.keys()
        assert set(target.needs) <= target.takes


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("abci-v", {"gpus_per_node": 8}, "a node of abci-v has 4 GPUs and is given whole, not 8 of them"),
        ("abci-a", {"gpus_per_node": 4}, "a node of abci-a has 8 GPUs"),
        ("abci-h", {"gpus_per_node": 1}, "drop --gpus-per-node or say 8"),
        ("abci-v", {"gpus_per_node": 4, "nodes": 513}, "at most 512 nodes, not 513"),
        ("abci-a", {"nodes": 65}, "at most 64 nodes, not 65"),
        ("abci-v", {"gpus_per_node": 4, "group": "g"}, "abci-v takes no job without --time: add it"),
        ("abci-h", {"time": "1h"}, "abci-h takes no job without --group: add it"),
        ("local", {"queue": "q"}, r"local can do nothing with --queue \(q\): drop it, or go to one of abci-h, slurm"),
        ("slurm", {"hostfile": "h"}, r"slurm can do nothing with --hostfile \(h\)"),
        ("local", {"nodes": 2}, "local is this machine alone, not 2 nodes: take torchrun or mpirun"),
        ("mpirun", {"nodes": 2}, "mpirun does not know the 2 hosts: name a file that lists them with --hostfile"),
    ],
)
def test_what_a_target_cannot_take(name, fields, message):
    with pytest.raises(UserError, match=message):
        render(name, **fields)


def test_unknown_target():
    with pytest.raises(UserError, match=r"unknown target 'abci' \(did you mean abci-"):
        TARGETS["abci"]
