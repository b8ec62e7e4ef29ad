"""A DeepSpeedEngine around Megatron's model."""

from argparse import Namespace
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer import _get_megatron_optimizer_based_on_param_groups, _get_param_groups

from megatron_ru.engines.deepspeed.config import Config, build_config
from megatron_ru.engines.deepspeed.engine_state import state_of
from megatron_ru.engines.deepspeed.groups import Groups
from megatron_ru.engines.deepspeed.model import EngineModel, add_tensor_parallel_sums
from megatron_ru.engines.deepspeed.optimizer import EngineOptimizer
from megatron_ru.engines.deepspeed.optimizer_checkpoint import OptimizerCheckpoint
from megatron_ru.engines.deepspeed.sharding_early import end_early_sharding
from megatron_ru.engines.deepspeed.support import import_deepspeed, quieten
from megatron_ru.engines.deepspeed.weights import ShardedWeights, Weights

_engine: Any = None


def current_engine() -> Any:
    """The engine of this process."""
    return _engine


def build_engine(
    args: Namespace, given: Config, config: Any, model: EngineModel, config_overrides: Any
) -> EngineOptimizer:
    """Starts the engine of the model and gives back what Megatron's loop takes for its optimizer.

    `given` is the user's JSON, `config` Megatron's OptimizerConfig. Raises `UserError` where JSON and arguments differ.
    """
    global _engine
    deepspeed = import_deepspeed()
    quieten(given)
    groups = Groups()
    settings = build_config(args, given, groups.get_data_parallel_world_size())
    stage = settings["zero_optimization"]["stage"]
    if not settings["zero_optimization"].get("offload_optimizer"):
        adam = _adam(config, model, config_overrides)
    else:
        adam = _adam_on_cpu(config, model, config_overrides)
    # Before the engine's own hooks, which take the gradients away.
    add_tensor_parallel_sums(model, parallel_state.get_tensor_model_parallel_group())
    end_early_sharding(model.module)
    engine, _, _, _ = deepspeed.initialize(model=model.module, optimizer=adam, mpu=groups, config=settings)
    _engine = engine
    state = state_of(engine.optimizer)
    kind = ShardedWeights if stage == 3 else Weights
    weights = kind(model.core, state, groups.get_data_parallel_group())
    model.start(engine, weights)
    engine.set_gradient_accumulation_boundary(True)
    if engine.global_rank == 0:
        where = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "the device")
        print(
            f"megatron_ru: DeepSpeed {deepspeed.__version__}, ZeRO {stage}, the optimizer's state on {where}",
            flush=True,
        )
    low = bool(args.fp16 or args.bf16)
    optimizer = EngineOptimizer(engine, config, state, OptimizerCheckpoint(weights, state, has_copies=low))
    if args.check_for_nan_in_loss_and_grad:
        optimizer.stop_at_nan()
    return optimizer


def _adam(config: Any, model: EngineModel, config_overrides: Any) -> Any:
    """The Adam that Megatron would step with, of the same groups of parameters."""
    groups = _groups(config, model, config_overrides)
    adam, _ = _get_megatron_optimizer_based_on_param_groups(config, [model], groups, skip_megatron_wrapping=True)
    return adam


def _adam_on_cpu(config: Any, model: EngineModel, config_overrides: Any) -> Any:
    """Torch's, whose fused form for the CPU needs no compiler."""
    import torch

    return torch.optim.AdamW(
        _groups(config, model, config_overrides), lr=config.lr, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True,
    )  # fmt: skip


def _groups(config: Any, model: EngineModel, config_overrides: Any) -> list[dict[str, Any]]:
    return [group for group in _get_param_groups([model], config, config_overrides) if group["params"]]
