"""DeepSpeed's JSON from Megatron's arguments, beside what the user's own JSON says."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError

Config = dict[str, Any]

# Sections that would do beside Megatron what Megatron does here, and the flag to use instead.
_NOT_DEEPSPEEDS = {
    "scheduler": "the learning rate is Megatron's (--lr, --lr-decay-style, --lr-warmup-iters)",
    "activation_checkpointing": "recomputation is Megatron's (--recompute-granularity)",
    "tensor_parallel": "tensor parallelism is Megatron's (--tensor-model-parallel-size)",
    "pipeline": "there is no pipeline parallelism with this engine",
    "sequence_parallel_size": "sequence parallelism is Megatron's (--sequence-parallel)",
    "data_efficiency": "the data is Megatron's (--data-path)",
    "curriculum_learning": "the data is Megatron's (--data-path)",
    "progressive_layer_drop": "the layers are Megatron's",
    "compression_training": "the layers are Megatron's",
    "expert_parallel": "there is no expert parallelism with this engine",
}


def read_config(path: str | None) -> Config:
    """What the user's JSON says, {} without one. Raises `UserError` when it cannot be read."""
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"--deepspeed_config {path} holds a {type(found).__name__}, expected an object of settings")
    return found


def stage_of(args: Namespace, given: Config) -> int:
    """The ZeRO stage that the flag says, or the JSON, or else 1."""
    written = given.get("zero_optimization", {}).get("stage", "auto")
    stage: int = _agreed("zero_optimization.stage", written, "--zero-stage", args.zero_stage, otherwise=1)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage is {stage!r} in --deepspeed_config, expected 0, 1, 2 or 3")
    return stage


def build_config(args: Namespace, given: Config, data_parallel_size: int) -> Config:
    """What `deepspeed.initialize` takes. `args` are Megatron's, completed and checked by Megatron.

    Raises `UserError` where the JSON contradicts them, or asks DeepSpeed for what Megatron does.
    """
    for section, reason in _NOT_DEEPSPEEDS.items():
        if given.get(section):
            raise UserError(f"--deepspeed_config has the section {section!r}, but {reason}; take the section out")
    stage = stage_of(args, given)
    config = {name: value for name, value in given.items() if name != "optimizer"}
    _check_optimizer(args, given.get("optimizer"))
    # Divided already: by its micro-batches, as Megatron divides it.
    steps = args.global_batch_size // (args.micro_batch_size * data_parallel_size)
    ours = {
        "train_micro_batch_size_per_gpu": ("--micro-batch-size", args.micro_batch_size),
        "gradient_accumulation_steps": ("--global-batch-size and --micro-batch-size", steps),
        "train_batch_size": ("--global-batch-size", args.micro_batch_size * data_parallel_size * steps),
        "gradient_clipping": ("--clip-grad", args.clip_grad),
    }
    for name, (flag, value) in ours.items():
        config[name] = _agreed(name, given.get(name, "auto"), flag, value)
    config["fp16"] = _fp16(args, given.get("fp16", {}))
    config["bf16"] = _bf16(args, given.get("bf16", {}))
    config["data_types"] = _data_types(args, given.get("data_types", {}), stage)
    if args.accumulate_allreduce_grads_in_fp32 and stage > 0:
        config.setdefault("communication_data_type", "fp32")
    config["zero_optimization"] = _zero(args, given.get("zero_optimization", {}), stage)
    # Megatron's log tells of every step.
    config.setdefault("steps_per_print", 10**9)
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _zero(args: Namespace, given: Config, stage: int) -> Config:
    zero = {**given, "stage": stage}
    written = zero.get("offload_optimizer") or {}
    device = _agreed(
        "zero_optimization.offload_optimizer.device", written.get("device", "auto"), "--zero-offload",
        args.zero_offload, otherwise="none",
    )  # fmt: skip
    if device != "none":
        if stage == 0:
            raise UserError("--zero-offload needs ZeRO: give --zero-stage 1, 2 or 3, or leave it out")
        zero["offload_optimizer"] = {"pin_memory": True, **written, "device": device}
    else:
        zero.pop("offload_optimizer", None)
    return zero


def _fp16(args: Namespace, given: Config) -> Config:
    enabled = _agreed("fp16.enabled", given.get("enabled", "auto"), "--fp16", bool(args.fp16))
    if not enabled:
        return {"enabled": False}
    scale = args.loss_scale or 0
    ours = {
        "loss_scale": ("--loss-scale", scale),
        "initial_scale_power": ("--initial-loss-scale", int(math.log2(args.initial_loss_scale))),
        "loss_scale_window": ("--loss-scale-window", int(args.loss_scale_window)),
        "hysteresis": ("--hysteresis", args.hysteresis),
        "min_loss_scale": ("--min-loss-scale", args.min_loss_scale),
    }
    fixed = {name: _agreed(f"fp16.{name}", given.get(name, "auto"), *pair) for name, pair in ours.items()}
    return {**given, **fixed, "enabled": True}


def _bf16(args: Namespace, given: Config) -> Config:
    enabled = _agreed("bf16.enabled", given.get("enabled", "auto"), "--bf16", bool(args.bf16))
    return {**given, "enabled": enabled}


def _data_types(args: Namespace, given: Config, stage: int) -> Config:
    if not (args.bf16 or args.fp16) or stage == 0:
        # Without ZeRO DeepSpeed accumulates in the precision of the weights, and nothing else.
        return given
    ours = "fp32" if args.accumulate_allreduce_grads_in_fp32 else "bf16" if args.bf16 else "fp16"
    flag = "--accumulate-allreduce-grads-in-fp32"
    return {**given, "grad_accum_dtype": _agreed("data_types.grad_accum_dtype", given.get("grad_accum_dtype", "auto"),
                                                 flag, ours)}  # fmt: skip


def _check_optimizer(args: Namespace, given: Config | None) -> None:
    """Raises `UserError` for an optimizer in the JSON that is not the one of Megatron's arguments."""
    if args.optimizer != "adam":
        raise UserError(f"--engine deepspeed steps with Adam, and --optimizer {args.optimizer} was given; drop it")
    if not given:
        return
    if given.get("type", "AdamW") not in ("Adam", "AdamW"):
        raise UserError(
            f"--deepspeed_config asks for the optimizer {given['type']!r}, and this engine steps with AdamW; take the "
            "section out"
        )
    params = given.get("params", {})
    _agreed("optimizer.params.lr", params.get("lr", "auto"), "--lr", args.lr)
    _agreed("optimizer.params.weight_decay", params.get("weight_decay", "auto"), "--weight-decay", args.weight_decay)
    _agreed("optimizer.params.eps", params.get("eps", "auto"), "--adam-eps", args.adam_eps)
    betas = params.get("betas", "auto")
    _agreed(
        "optimizer.params.betas", betas if betas == "auto" else [float(beta) for beta in betas],
        "--adam-beta1 and --adam-beta2", [args.adam_beta1, args.adam_beta2],
    )  # fmt: skip


def _agreed(name: str, written: Any, flag: str, ours: Any, otherwise: Any = None) -> Any:
    """What both say, or the one that speaks, or `otherwise`. Raises `UserError` when they differ."""
    if written in ("auto", None):
        return otherwise if ours is None else ours
    if ours is not None and written != ours:
        raise UserError(
            f"--deepspeed_config says {name} {written!r}, and {flag} says {ours!r}; make them agree, or take {name} "
            "out of the JSON"
        )
    return written
