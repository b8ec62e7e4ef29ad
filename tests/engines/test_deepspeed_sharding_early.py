"""What ZeRO 3 keeps of a weight that it takes early, and what the rest of Megatron still sees of it."""

import importlib
from argparse import Namespace

import pytest
import torch
from torch import nn

from megatron_ru.engines.deepspeed import sharding_early
from megatron_ru.engines.deepspeed.sharding_early import EarlySharding, end_early_sharding, is_sharded, looking_whole


@pytest.fixture
def taking(one_process, monkeypatch):
    """taking(bf16) gives an EarlySharding of this process alone."""
    for name, value in {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("deepspeed")
    # DeepSpeed replaces it for good, and compiles the other.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    configs = []

    def build_config(args, given, ranks):
        configs.append((given, ranks))
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": args.bf16},
        }

    monkeypatch.setattr(sharding_early, "build_config", build_config)

    def make(bf16):
        monkeypatch.setattr("megatron.training.get_args", lambda: Namespace(bf16=bf16, fp16=False))
        return EarlySharding({"seed": 1})

    yield make
    assert configs == [({"seed": 1}, 1)], "settings are read once"


@pytest.mark.parametrize("bf16", [False, True])
def test_a_weight_that_was_taken_looks_whole_until_the_engine_starts(taking, bf16):
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    model[0].weight.tensor_model_parallel = True
    before = {weight: weight.detach().clone() for weight in model.parameters()}
    take = taking(bf16)
    for module in model.modules():
        take(list(module.parameters(recurse=False)))
    take(list(model.parameters()))
    dtype = torch.bfloat16 if bf16 else torch.float32
    for weight, value in before.items():
        assert is_sharded(weight)
        assert torch.equal(weight.ds_tensor, value.flatten().to(dtype))
        assert (weight.shape, weight.dtype) == (value.shape, dtype)
        assert weight.untyped_storage().nbytes() == dtype.itemsize
    assert [weight.ds_id for weight in before] == sorted(weight.ds_id for weight in before)
    assert model[0].weight.tensor_model_parallel is True
    # What Megatron does between the building and the engine.
    model.cuda(0)
    if bf16:
        model.bfloat16()
    assert sum(weight.nelement() for weight in model.parameters()) == 40
    end_early_sharding(model)
    assert [weight.shape for weight in model.parameters()] == [(0,)] * 5
    weight = model[2].weight
    weight.all_gather()
    assert torch.equal(weight, before[weight].to(dtype))


def test_a_model_that_nobody_took_stays():
    model = nn.Linear(2, 2)
    end_early_sharding(model)
    assert model.weight.numel() == 4


def test_what_looks_whole_takes_no_memory():
    parameter = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    parameter.ds_shape = torch.Size((1000, 1000))
    found = looking_whole(parameter)
    assert (found.shape, found.dtype, found.untyped_storage().nbytes()) == ((1000, 1000), torch.bfloat16, 2)
