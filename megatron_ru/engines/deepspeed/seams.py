"""Where a DeepSpeedEngine enters Megatron's training loop."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_ru.engines.deepspeed.config import Config, read_config, stage_of
from megatron_ru.engines.deepspeed.support import check_supported, import_deepspeed
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.seams.seam import Seam

_REASON = "Megatron knows its own ways of holding gradients and optimizer only"


def deepspeed_seams(args: Namespace) -> list[Seam]:
    """The seams of one run with --engine deepspeed; install them before all others, which go around them.

    Raises `UserError` for what the engine does not carry out, a JSON that cannot be read, or a missing package.
    """
    given = read_config(args.deepspeed_config)
    check_supported(args, stage_of(args, given))
    import_deepspeed()
    checkpoints_of_distributed_optimizer = args.use_distributed_optimizer
    # Beside ZeRO the flag says how a checkpoint holds the optimizer, and nothing else.
    args.use_distributed_optimizer = False
    seams = [
        Seam(
            target="megatron.training.models.dist_utils:_ddp_wrap",
            make=lambda _: _wrap,
            expects=("model",),
            reason=_REASON,
        ),
        Seam(
            target="megatron.training.training:get_megatron_optimizer",
            make=functools.partial(_with_engine, given),
            expects=("config", "model_chunks", "config_overrides"),
            reason=_REASON,
        ),
        Seam(
            target="megatron.core.pipeline_parallel.schedules:backward_step",
            make=_backward,
            expects=("input_tensor", "output_tensor", "output_tensor_grad", "config"),
            reason="ZeRO reduces gradients during the backward pass, which has to be its own",
        ),
    ]
    if checkpoints_of_distributed_optimizer:
        seams.append(
            Seam(
                target="megatron.training.checkpointing:_build_sharded_state_dict_metadata",
                make=_reshardable,
                reason="Megatron names the form of the optimizer after its own one",
            )
        )
    if args.ru_nan_grads is not None:
        from megatron_ru.engines.deepspeed.nan_guard import nan_guard_seams

        seams += nan_guard_seams()
    if CPU_DEVICE.installed:
        seams.append(
            Seam(
                target="deepspeed.comm.torch:build_shm_op",
                make=lambda _: lambda: None,
                reason="DeepSpeed compiles an all-reduce through shared memory, for which a laptop may lack a compiler",
                optional=True,
            )
        )
    return seams


def _wrap(model: list[Any], *arguments: Any, **keywords: Any) -> list[Any]:
    from megatron_ru.engines.deepspeed.model import EngineModel

    return [EngineModel(module) for module in model]


def _with_engine(given: Config, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer(
        config: Any, model_chunks: list[Any], config_overrides: Any = None, **keywords: Any
    ) -> Any:
        from megatron.training import get_args

        from megatron_ru.engines.deepspeed.building import build_engine

        return build_engine(get_args(), given, config, model_chunks[0], config_overrides)

    return get_megatron_optimizer


def _backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward_step(
        input_tensor: Any, output_tensor: Any, output_tensor_grad: Any, config: Any, *rest: Any, **keywords: Any
    ) -> Any:
        from megatron_ru.engines.deepspeed.building import current_engine

        if config.timers is not None:
            config.timers("backward-compute", log_level=2).start()
        # Megatron has divided the loss by the number of micro-batches.
        current_engine().backward(output_tensor, scale_wrt_gas=False)
        if config.timers is not None:
            config.timers("backward-compute").stop()

    return backward_step


def _reshardable(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def metadata(*arguments: Any, **keywords: Any) -> Any:
        return {
            **original(*arguments, **keywords),
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }

    return metadata
