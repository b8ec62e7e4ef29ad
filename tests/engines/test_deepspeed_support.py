"""What --engine deepspeed refuses, and how it says that the package is missing."""

import sys
from argparse import ArgumentParser, Namespace

import pytest

from megatron_ru.engines.choice import engine_seams
from megatron_ru.engines.deepspeed.flags import add_engine_flags
from megatron_ru.engines.deepspeed.support import check_engine, check_supported, import_deepspeed
from megatron_ru.foundation.errors import UserError


def arguments(**changes):
    settings = {
        "pipeline_model_parallel_size": 1, "overlap_grad_reduce": False, "overlap_param_gather": False,
        "log_num_zeros_in_grad": False, "log_params_norm": False, "data_parallel_random_init": False, "fp16": False,
        "save": None, "load": None, "ckpt_format": "torch_dist",
    }  # fmt: skip
    return Namespace(**settings | changes)


def test_flags():
    parser = add_engine_flags(ArgumentParser())
    assert vars(parser.parse_args([])) == {
        "engine": "megatron", "deepspeed_config": None, "zero_stage": None, "zero_offload": None
    }  # fmt: skip
    given = parser.parse_args(["--engine", "deepspeed", "--zero-stage", "0", "--deepspeed_config", "a.json"])
    assert (given.engine, given.zero_stage, given.deepspeed_config) == ("deepspeed", 0, "a.json")


def test_the_megatron_engine_has_no_seams_and_no_flags_of_deepspeed():
    args = add_engine_flags(ArgumentParser()).parse_args([])
    assert engine_seams(args) == []
    args = add_engine_flags(ArgumentParser()).parse_args(["--zero-stage", "0", "--zero-offload", "cpu"])
    with pytest.raises(UserError, match="--zero-stage, --zero-offload needs --engine deepspeed"):
        check_engine(args)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size was given"),
        ({"num_experts": 8}, "--num-experts was given"),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, "--overlap-grad-reduce, --overlap-param-gather"),
        ({"optimizer_cpu_offload": True}, "use --zero-offload cpu"),
        ({"decoupled_weight_decay": False}, "--no-decoupled-weight-decay"),
        ({"save": "x", "ckpt_format": "torch"}, "torch_dist only, and torch was given"),
        ({"fp16": True, "stage": 0}, "does not scale the loss"),
        ({"log_params_norm": True, "stage": 3}, "--log-params-norm with ZeRO 3"),
    ],
)
def test_what_is_not_carried_out(changes, words):
    stage = changes.pop("stage", 2)
    with pytest.raises(UserError, match=words):
        check_supported(arguments(**changes), stage)


def test_the_rest_is_carried_out():
    check_supported(arguments(log_params_norm=True, save="x"), 2)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in [name for name in sys.modules if name.startswith("deepspeed.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"--engine deepspeed needs .*pip install 'megatron-ru\[deepspeed\]'"):
        import_deepspeed()


def test_an_old_package_is_refused(monkeypatch):
    from types import ModuleType

    old = ModuleType("deepspeed")
    old.__version__ = "0.15.4+cpu"
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(UserError, match=r"deepspeed 0\.15\.4\+cpu is installed, expected 0\.19 or newer"):
        import_deepspeed()
