"""The optimizer that Megatron's loop holds: its step is the engine's."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.engines.deepspeed.engine_state import EngineState
from megatron_ru.engines.deepspeed.optimizer_checkpoint import OptimizerCheckpoint
from megatron_ru.plugin.nan_gradients import NanFoundError


class EngineOptimizer:
    """What Megatron asks of a MegatronOptimizer, answered by a DeepSpeedEngine."""

    is_stub_optimizer = False

    def __init__(self, engine: Any, config: Any, state: EngineState, checkpoint: OptimizerCheckpoint):
        self.config = config
        self.grad_scaler = LossScale(engine.optimizer) if config.fp16 else None
        self._engine = engine
        self._state = state
        self._checkpoint = checkpoint
        self._stops_at_nan = False
        self._pending = False

    def stop_at_nan(self) -> None:
        """A gradient that is none ends the run, as Megatron's own check does."""
        self._stops_at_nan = not self.config.fp16

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's groups; the schedule of the learning rate writes into them."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def get_loss_scale(self) -> Tensor:
        """[1]: what the loss is multiplied with."""
        scale = getattr(self._engine.optimizer, "loss_scale", 1.0) if self.config.fp16 else 1.0
        return torch.tensor([float(scale)], dtype=torch.float32, device=_device())

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times its scale. Only losses beside the main one come here: that one is scaled by the engine."""
        return loss * self.get_loss_scale()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what is left of a step that was not made."""
        if self._pending:
            self._state.forget_gradients()
        self._pending = True

    def step(self) -> tuple[bool, float | None, None]:
        """(whether the weights have changed, the gradients' norm before clipping, None)."""
        norm = self._clip_without_zero()
        self._engine.step()
        self._pending = False
        done = bool(self._engine.was_step_applied())
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        if self._stops_at_nan and norm is not None and not (done and 0 <= norm < float("inf")):
            raise NanFoundError(
                f"the norm of the gradients is {norm}: one of them holds a NaN or an infinity; --ru-nan-grads zero "
                "would go on without it"
            )
        return done, norm if done else None, None

    def reload_model_params(self, state_dict: Any = None) -> None:
        """The optimizer's weights become the model's."""
        self._state.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: only `sharded_state_dict` holds all of it."""
        return {}

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's own optimizer writes it, or is to read it."""
        if is_loading:
            return self._checkpoint.template(metadata or {})
        return self._checkpoint.saved(metadata or {}, self.param_groups, self.grad_scaler)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was read."""
        self._checkpoint.load(state_dict, self.param_groups, self.grad_scaler)

    def _clip_without_zero(self) -> Tensor | None:
        """The norm where DeepSpeed keeps none: fp32 without ZeRO. Its gradients are clipped here."""
        engine = self._engine
        if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
            return None
        from deepspeed.runtime.utils import clip_grad_norm_

        bound = self.config.clip_grad or float("inf")
        return clip_grad_norm_(parameters=engine.module.parameters(), max_norm=bound, mpu=engine.mpu)


class LossScale:
    """DeepSpeed's scale of an fp16 loss, as Megatron tells it of overflows and writes it into checkpoints."""

    def __init__(self, optimizer: Any):
        self._scaler = optimizer.loss_scaler

    def update(self, found_inf: bool) -> None:
        """One more step, with an overflow or without."""
        self._scaler.update_scale(found_inf)

    def state_dict(self) -> dict[str, Any]:
        """Megatron's names: the scale, the steps since it changed, and the overflows that are still forgiven."""
        scaler = self._scaler
        state: dict[str, Any] = {"scale": torch.tensor([float(scaler.cur_scale)], dtype=torch.float32)}
        if getattr(scaler, "dynamic", False):
            state["growth_tracker"] = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
            state["hysteresis_tracker"] = scaler.cur_hysteresis
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the scale over; a constant one stays."""
        scaler = self._scaler
        if getattr(scaler, "dynamic", False) and "growth_tracker" in state:
            scaler.cur_scale = float(state["scale"])
            scaler.cur_iter = scaler.last_overflow_iter + 1 + int(state["growth_tracker"])
            scaler.cur_hysteresis = int(state["hysteresis_tracker"])


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
