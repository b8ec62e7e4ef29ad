"""The optimizer's state in the form that Megatron's own optimizers write and read.

There are two. Megatron's plain optimizer writes `optimizer.state.PART.PARAMETER` and one count of steps; its
distributed optimizer, with --dist-ckpt-optim-fully-reshardable, the same with `param` for the weights in fp32 and a
count in each group. Both hold every parameter whole, whatever the layout that saved it, and so both are read here.
"""

from copy import deepcopy
from typing import Any

import torch
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

from megatron_ru.engines.deepspeed.engine_state import MOMENTS, WEIGHT, EngineState
from megatron_ru.engines.deepspeed.weights import Weights, as_main_replica
from megatron_ru.foundation.errors import UserError

RESHARDABLE = "fully_reshardable"
_OURS = "ru_parts"


class OptimizerCheckpoint:
    """Reads and writes it. `has_copies`: whether the weights in fp32 are others than the model's."""

    def __init__(self, weights: Weights, state: EngineState, has_copies: bool):
        self._weights = weights
        self._state = state
        self._has_copies = has_copies

    def saved(self, metadata: dict[str, Any], groups: list[dict[str, Any]], scaler: Any) -> dict[str, Any]:
        """Everything there is, this rank's tensors in main memory."""
        self._state.prepare()
        step = torch.tensor(self._state.steps, dtype=torch.float32)
        distributed = _is_distributed(metadata)
        plain = [{name: deepcopy(value) for name, value in group.items() if name != "params"} for group in groups]
        common: dict[str, Any] = {"param_groups": plain}
        if distributed:
            common["param_groups"] = [{**group, "step": float(step)} for group in plain]
        else:
            common["state"] = {"common_step": step}
        found = {"optimizer": common} if distributed or self._has_copies else common
        if distributed:
            found["param_state_sharding_type"] = RESHARDABLE
        if scaler is not None:
            found["grad_scaler"] = scaler.state_dict()
        found[_OURS] = self._parts(metadata, self._gather)
        return found

    def template(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """What is to be read: this rank's tensors."""
        return {_OURS: self._parts(metadata, self._empty)}

    def load(self, found: dict[str, Any], groups: list[dict[str, Any]], scaler: Any) -> None:
        """Takes over what was read."""
        self._state.prepare()
        common = found.get("optimizer", found)
        for group in groups:
            _take_over(group, common["param_groups"])
        for name, parameter in self._weights.parameters.items():
            for part in self._kinds():
                value = found.get(_OURS, {}).get(name, {}).get(part)
                self._state.write(parameter, part, self._weights.hand_out(name, value))
        count = common.get("state", {}).get("common_step", common["param_groups"][0].get("step", 0))
        self._state.steps = float(count)
        if scaler is not None and "grad_scaler" in found:
            scaler.load_state_dict(found["grad_scaler"])

    def _kinds(self) -> tuple[str, ...]:
        return (WEIGHT, *MOMENTS) if self._has_copies else MOMENTS

    def _parts(self, metadata: dict[str, Any], data_of: Any) -> dict[str, Any]:
        """{parameter: {part: shard}} of the parameters that this rank owns; all ranks ask for all of them together."""
        distributed = _is_distributed(metadata)
        shards = self._weights.shards(metadata=metadata)
        found: dict[str, Any] = {}
        for name in self._weights.parameters:
            for part in (WEIGHT, *MOMENTS) if distributed and data_of == self._gather else self._kinds():
                data = data_of(name, part)
                if data is not None:
                    key = "param" if distributed and part == WEIGHT else part
                    shard = as_main_replica(shards[name], data, f"optimizer.state.{key}")
                    found.setdefault(name, {})[part] = shard
        return found

    def _gather(self, name: str, part: str) -> Tensor | None:
        whole = self._state.read(self._weights.parameters[name], part)
        return whole.detach().to("cpu", torch.float32, copy=True) if self._weights.owns(name) else None

    def _empty(self, name: str, part: str) -> Tensor | None:
        shape = self._weights.shape_of(self._weights.parameters[name])
        return torch.empty(shape, dtype=torch.float32, device="cpu") if self._weights.owns(name) else None


def _is_distributed(metadata: dict[str, Any]) -> bool:
    kind = metadata.get("distrib_optim_sharding_type")
    if kind not in (None, RESHARDABLE):
        raise UserError(
            f"the checkpoint holds the optimizer as Megatron's distributed optimizer shards it ({kind}), which only "
            "the same layout can read; save it with --dist-ckpt-optim-fully-reshardable, or load it with "
            "--no-load-optim"
        )
    return kind == RESHARDABLE


def _take_over(group: dict[str, Any], saved: list[dict[str, Any]]) -> None:
    """The settings of the group that was saved under the same identity. Raises `UserError` when there is none."""
    identity = [group.get(key) for key in param_group_identifier_keys]
    for other in saved:
        if [other.get(key) for key in param_group_identifier_keys] == identity:
            group.update({name: value for name, value in other.items() if name in group and name != "params"})
            return
    raise UserError(
        "the checkpoint has no group of parameters with the settings of this run (weight decay, learning rates); give "
        "the same --lr, --min-lr and --weight-decay, or load it with --no-load-optim"
    )
