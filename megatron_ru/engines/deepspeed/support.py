"""What the DeepSpeed engine does not carry out, known before anything is built."""

import logging
import os
from argparse import Namespace
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require
from megatron_ru.seams.cpu_device import CPU_DEVICE

OLDEST = (0, 19)


def check_engine(args: Namespace) -> None:
    """Raises `UserError` for flags that need the engine that was not chosen."""
    if args.engine != "deepspeed":
        flags = {
            "--deepspeed_config": args.deepspeed_config,
            "--zero-stage": args.zero_stage,
            "--zero-offload": args.zero_offload,
        }
        found = [flag for flag, value in flags.items() if value is not None]
        if found:
            raise UserError(f"{', '.join(found)} needs --engine deepspeed: add it, or drop the flag")


def check_supported(args: Namespace, stage: int) -> None:
    """Raises `UserError` for what cannot be trained with this engine. `args` are as the user typed them."""
    unsupported = {
        "--pipeline-model-parallel-size": (args.pipeline_model_parallel_size or 1) > 1,
        "--num-experts": bool(getattr(args, "num_experts", None)),
        "--expert-model-parallel-size": (getattr(args, "expert_model_parallel_size", 1) or 1) > 1,
        "--overlap-grad-reduce": args.overlap_grad_reduce,
        "--overlap-param-gather": args.overlap_param_gather,
        "--use-megatron-fsdp": getattr(args, "use_megatron_fsdp", False),
        "--use-torch-fsdp2": getattr(args, "use_torch_fsdp2", False),
        "--optimizer-cpu-offload (use --zero-offload cpu)": getattr(args, "optimizer_cpu_offload", False),
        "--use-precision-aware-optimizer": getattr(args, "use_precision_aware_optimizer", False),
        "--calculate-per-token-loss": getattr(args, "calculate_per_token_loss", False),
        "--log-num-zeros-in-grad": args.log_num_zeros_in_grad,
        "--log-params-norm with ZeRO 3": stage == 3 and args.log_params_norm,
        "--no-decoupled-weight-decay": not getattr(args, "decoupled_weight_decay", True),
        "--decoupled-lr": getattr(args, "decoupled_lr", None) is not None,
        "--data-parallel-random-init": args.data_parallel_random_init,
        "--save-wgrads-interval": getattr(args, "save_wgrads_interval", None) is not None,
    }
    found = [flag for flag, used in unsupported.items() if used]
    if found:
        raise UserError(
            f"{', '.join(found)} was given, which --engine deepspeed does not carry out; drop it, or train with "
            "--engine megatron"
        )
    if args.fp16 and stage == 0:
        raise UserError(
            "--fp16 with --zero-stage 0 was given, but without ZeRO DeepSpeed does not scale the loss: give "
            "--zero-stage 1, or --bf16"
        )
    if args.fp16 and CPU_DEVICE.installed:
        raise UserError("--fp16 was given, and DeepSpeed has none on a CPU: give --bf16, or neither")
    if (args.save or args.load) and args.ckpt_format != "torch_dist":
        raise UserError(
            f"--engine deepspeed saves and loads checkpoints of --ckpt-format torch_dist only, and {args.ckpt_format} "
            "was given; drop the flag"
        )


def import_deepspeed() -> Any:
    """The package; on the CPU it learns that there is no GPU. Raises `UserError` when it is missing or too old."""
    if CPU_DEVICE.installed:
        # Torch says here that it has a GPU, and DeepSpeed would believe it.
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deepspeed = require("deepspeed", "--engine deepspeed", "deepspeed")
    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed, expected {'.'.join(map(str, OLDEST))} or newer: "
            "pip install 'megatron-ru[deepspeed]'"
        )
    return deepspeed


def quieten(given: dict[str, Any]) -> None:
    """DeepSpeed tells of every buffer that it makes, unless the user's JSON says how much it tells."""
    if "log_level" not in given:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
