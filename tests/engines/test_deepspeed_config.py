"""DeepSpeed's JSON beside Megatron's arguments: what is filled in, and what is refused."""

import json
from argparse import Namespace

import pytest

from megatron_ru.engines.deepspeed.config import build_config, read_config, stage_of
from megatron_ru.foundation.errors import UserError


def arguments(**changes):
    settings = {
        "micro_batch_size": 2, "global_batch_size": 32, "clip_grad": 1.0, "fp16": False, "bf16": False,
        "accumulate_allreduce_grads_in_fp32": False, "zero_stage": None, "zero_offload": None, "optimizer": "adam",
        "lr": 3e-4, "weight_decay": 0.1, "adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "loss_scale": None, "initial_loss_scale": 2**32, "loss_scale_window": 1000.0, "hysteresis": 2,
        "min_loss_scale": 1.0,
    }  # fmt: skip
    return Namespace(**settings | changes)


def test_a_run_without_a_json():
    config = build_config(arguments(), {}, 4)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 32
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"] == {"stage": 1}
    assert config["fp16"] == {"enabled": False}
    assert config["bf16"] == {"enabled": False}
    assert "communication_data_type" not in config


def test_bf16_adds_up_and_travels_in_fp32_as_in_megatron():
    args = arguments(bf16=True, accumulate_allreduce_grads_in_fp32=True, zero_stage=2)
    config = build_config(args, {}, 4)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    without_zero = build_config(arguments(bf16=True, accumulate_allreduce_grads_in_fp32=True, zero_stage=0), {}, 4)
    assert without_zero["data_types"] == {}


def test_fp16_takes_megatrons_loss_scale():
    found = build_config(arguments(fp16=True), {"fp16": {"enabled": "auto", "hysteresis": "auto"}}, 4)["fp16"]
    assert found == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2,
        "min_loss_scale": 1.0,
    }  # fmt: skip
    assert build_config(arguments(fp16=True, loss_scale=128.0), {}, 4)["fp16"]["loss_scale"] == 128.0


@pytest.mark.parametrize(
    ("flag", "written", "stage"), [(None, None, 1), (2, None, 2), (None, 3, 3), (2, "auto", 2), (0, 0, 0)]
)
def test_the_stage_is_the_flags_or_the_jsons(flag, written, stage):
    given = {} if written is None else {"zero_optimization": {"stage": written}}
    assert stage_of(arguments(zero_stage=flag), given) == stage


def test_what_is_deepspeeds_own_is_handed_on():
    given = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "wall_clock_breakdown": True}
    config = build_config(arguments(), given, 4)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert config["wall_clock_breakdown"] is True


def test_offload():
    config = build_config(arguments(zero_offload="cpu"), {}, 4)
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    assert build_config(arguments(), given, 4)["zero_optimization"]["offload_optimizer"]["pin_memory"] is False
    with pytest.raises(UserError, match=r"offload_optimizer\.device 'cpu', and --zero-offload says 'none'"):
        build_config(arguments(zero_offload="none"), given, 4)
    with pytest.raises(UserError, match="--zero-offload needs ZeRO"):
        build_config(arguments(zero_offload="cpu", zero_stage=0), {}, 4)


def test_an_optimizer_that_says_the_same_is_no_contradiction():
    params = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.1}
    assert "optimizer" not in build_config(arguments(), {"optimizer": {"type": "AdamW", "params": params}}, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_batch_size": 64}, "says train_batch_size 64, and --global-batch-size says 32"),
        ({"gradient_accumulation_steps": 1}, "says gradient_accumulation_steps 1"),
        ({"gradient_clipping": 0.5}, "says gradient_clipping 0.5, and --clip-grad says 1.0"),
        ({"bf16": {"enabled": True}}, "says bf16.enabled True, and --bf16 says False"),
        ({"optimizer": {"type": "Lamb"}}, "the optimizer 'Lamb'"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, "optimizer.params.lr 1.0, and --lr says 0.0003"),
        ({"scheduler": {"type": "WarmupLR"}}, "the section 'scheduler', but the learning rate is Megatron's"),
        ({"tensor_parallel": {"autotp_size": 2}}, "--tensor-model-parallel-size"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage is 5"),
    ],
)
def test_contradictions_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        build_config(arguments(), given, 4)


def test_another_optimizer_is_refused():
    with pytest.raises(UserError, match="--optimizer sgd was given"):
        build_config(arguments(optimizer="sgd"), {}, 4)


def test_files(tmp_path):
    file = tmp_path / "deepspeed.json"
    assert read_config(None) == {}
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_config(str(file))
    file.write_text("{'a': 1}")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(str(file))
    file.write_text("[1]")
    with pytest.raises(UserError, match="holds a list, expected an object"):
        read_config(str(file))
    file.write_text(json.dumps({"steps_per_print": 3}))
    assert read_config(str(file)) == {"steps_per_print": 3}
