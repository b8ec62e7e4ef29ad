"""Who gathers and writes what."""

import pytest
import torch

from megatron_ru.engines.deepspeed.engine_state import share_of
from megatron_ru.engines.deepspeed.weights import as_main_replica, balanced


def test_every_rank_takes_about_the_same():
    sizes = [7, 100, 3, 50, 50, 8, 1]
    owners = balanced(sizes, 2)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [109, 110]
    assert balanced(sizes, 1) == [0] * 7
    assert balanced([5], 4) == [0]


def test_the_main_replica_keeps_its_place_among_tensor_parallel_ranks():
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    data = torch.zeros(4, 2, dtype=torch.bfloat16)
    shard = ShardedTensor.from_rank_offsets("layer.weight", data, (0, 1, 2), replica_id=(0, 1, 3))
    found = as_main_replica(shard, torch.ones(4, 2), "optimizer.state.exp_avg")
    assert found.replica_id == (0, 1, 0)
    assert found.key == "optimizer.state.exp_avg.layer.weight"
    assert found.dtype == torch.float32
    assert found.global_shape == (8, 2)
    assert found.data.sum() == 8
    assert as_main_replica(shard, data).key == "layer.weight"


@pytest.mark.parametrize(("rank", "expected"), [(0, [0.0, 1.0]), (1, [2.0, 3.0]), (2, [4.0, 0.0])])
def test_the_last_share_of_a_parameter_ends_in_zeros(monkeypatch, rank, expected):
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.empty(2)
    parameter.ds_tensor.ds_numel, parameter.ds_process_group = 2, "group"
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    assert share_of(parameter, torch.arange(5.0)).tolist() == expected
