"""Megatron's distributed optimizer around torch's AdamW, where neither Apex nor TransformerEngine is installed.

Torch keeps a step count with each parameter. megatron-core (0.16 to 0.20) reads it from an optimizer that has not
stepped yet, which fails while a checkpoint is loaded; it restores it as one tensor that all parameters share, which
torch then increments once for each; and it overwrites it with the count of the empty optimizer that served as the
template of the loading, or looks for a count that the format for any layout does not hold. Any of these ends the
restart, or makes the bias correction wrong from its first step.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_ru.seams.seam import Seam

_TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def torch_adam_seams() -> list[Seam]:
    """Seams on saving and loading of the distributed optimizer; empty where its Adam is not torch's."""
    from megatron.core.optimizer import distrib_optimizer

    if getattr(distrib_optimizer, "HAVE_APEX_OR_TE", True):
        return []
    return [
        Seam(
            target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
            make=_with_state,
            expects=("self",),
            reason="an optimizer that has not stepped has no step count, and megatron-core asserts that it has one",
        ),
        Seam(
            target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            make=_with_own_steps,
            expects=("self", "state_dict"),
            reason="megatron-core gives all parameters one step tensor, with the count of an empty optimizer",
        ),
        Seam(
            target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
            make=_without_step,
            expects=("self", "model_param", "tensors"),
            reason="megatron-core copies a step count that is stale, or that --dist-ckpt-optim-fully-reshardable lacks",
        ),
    ]


def _with_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def state_dict(self: Any) -> Any:
        inner = self.optimizer
        if isinstance(inner, _TORCH_ADAMS) and not inner.state:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return original(self)

    return state_dict


def _with_own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        # Shards of fp32 parameters are views of leaves; megatron-core copies into them with gradients on.
        with torch.no_grad():
            original(self, state_dict)
        if not isinstance(self.optimizer, _TORCH_ADAMS):
            return
        # megatron-core saves the one count that all parameters have with each group.
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step, dtype=torch.float32)

    return load_state_dict


def _without_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state.get(self.optimizer.param_groups[group]["params"][order], {})
        # The count comes from the groups, so here it is copied onto itself: megatron-core 0.16 cannot pass over it.
        original(self, model_param, {**tensors, "step": state.get("step")})

    return set_states
