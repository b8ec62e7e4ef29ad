"""Weights in fp32 and Adam's moments, read from and written to whatever optimizer DeepSpeed has built."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "fp32_param"


class EngineState:
    """The optimizer of a DeepSpeedEngine, parameter by parameter.

    Reading a part that is spread over the data-parallel ranks is done by all of them together, in the same order.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer

    @property
    def adam(self) -> Any:
        """The optimizer that steps."""
        return self._optimizer.optimizer

    def read(self, parameter: Any, part: str) -> Tensor:
        """fp32, in the parameter's own shape: `fp32_param`, `exp_avg` or `exp_avg_sq`."""
        raise NotImplementedError

    def write(self, parameter: Any, part: str, value: Tensor) -> None:
        """Keeps this rank's share of the value."""
        raise NotImplementedError

    def refresh(self) -> None:
        """The weights in fp32 become those of the model."""
        raise NotImplementedError

    def stepped(self) -> Iterable[Tensor]:
        """The tensors that Adam steps here."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Makes the moments where no step has made them yet."""
        for tensor in self.stepped():
            state = self.adam.state[tensor]
            if "exp_avg" not in state:
                self.adam.state[tensor] = state = {"step": torch.zeros((), dtype=torch.float32), **state}
                for name in MOMENTS:
                    state[name] = torch.zeros_like(tensor, requires_grad=False)

    @property
    def steps(self) -> float:
        """How many steps Adam has made."""
        counts = {float(self.adam.state[tensor]["step"]) for tensor in self.stepped() if self.adam.state.get(tensor)}
        return max(counts, default=0.0)

    @steps.setter
    def steps(self, count: float) -> None:
        for tensor in self.stepped():
            before = self.adam.state[tensor]["step"]
            self.adam.state[tensor]["step"] = torch.full_like(before, count) if torch.is_tensor(before) else int(count)

    def forget_gradients(self) -> None:
        """Drops what a step that is not made has gathered."""
        self._optimizer.zero_grad(set_to_none=True)


class PlainState(EngineState):
    """No ZeRO: Adam steps the model's own fp32 weights, or a copy of lower ones."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self._masters: dict[Any, Tensor] = {}
        for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
            self._masters.update(zip(low, high, strict=True))

    @property
    def adam(self) -> Any:
        """The optimizer that steps."""
        return self._optimizer.optimizer if self._masters else self._optimizer

    def read(self, parameter: Any, part: str) -> Tensor:
        return self._place(parameter, part).detach()

    @torch.no_grad()
    def write(self, parameter: Any, part: str, value: Tensor) -> None:
        self._place(parameter, part).copy_(value)

    @torch.no_grad()
    def refresh(self) -> None:
        for low, high in self._masters.items():
            high.copy_(low)

    def stepped(self) -> Iterable[Tensor]:
        return [parameter for group in self.adam.param_groups for parameter in group["params"]]

    def _place(self, parameter: Any, part: str) -> Tensor:
        master = self._masters.get(parameter, parameter)
        return master if part == WEIGHT else self.adam.state[master][part]


class ShardedState(EngineState):
    """ZeRO 1 and 2."""

    def read(self, parameter: Any, part: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if part == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, part)

    def write(self, parameter: Any, part: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if part == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)

    def refresh(self) -> None:
        self._optimizer.refresh_fp32_params()

    def stepped(self) -> Iterable[Tensor]:
        return self._optimizer.single_partition_of_fp32_groups

    def prepare(self) -> None:
        super().prepare()
        # DeepSpeed finds the moments of a parameter by links. It makes all of them when the first group of parameters
        # has stepped, and the other groups have no moments yet.
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def forget_gradients(self) -> None:
        super().forget_gradients()
        # What its own step does when it finds an overflow.
        self._optimizer.micro_step_id = -1
        self._optimizer._release_preflattened_grad_buffers()
        if self._optimizer.cpu_offload:
            self._optimizer.reset_cpu_buffers()
            return
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None
        for group in self._optimizer.all_grad_tensors:
            self._optimizer.all_grad_tensors[group] = None


class Bf16State(ShardedState):
    """ZeRO 1 over bf16 weights whose gradients are added up in fp32: an optimizer of its own in DeepSpeed."""

    def stepped(self) -> Iterable[Tensor]:
        return self._optimizer.fp32_groups_flat_partition

    def forget_gradients(self) -> None:
        EngineState.forget_gradients(self)


class ShardedWeightsState(EngineState):
    """ZeRO 3."""

    def read(self, parameter: Any, part: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if part == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, part)

    def write(self, parameter: Any, part: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        share = share_of(parameter, value)
        if part == WEIGHT:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, part)

    def refresh(self) -> None:
        self._optimizer.refresh_fp32_params()

    def stepped(self) -> Iterable[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def forget_gradients(self) -> None:
        super().forget_gradients()
        if self._optimizer.offload_optimizer:
            self._optimizer.reset_cpu_buffers()
        else:
            self._optimizer.averaged_gradients = {}


def share_of(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole parameter of ZeRO 3, flat, with zeros behind the end."""
    import torch.distributed

    size = parameter.ds_tensor.ds_numel
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    share = torch.zeros(size, dtype=value.dtype, device=value.device)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    share[: mine.numel()].copy_(mine)
    return share


def state_of(optimizer: Any) -> EngineState:
    """The optimizer that DeepSpeed has built, by what it is."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return ShardedWeightsState(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return ShardedState(optimizer)
    if isinstance(optimizer, BF16_Optimizer):
        return Bf16State(optimizer)
    return PlainState(optimizer)
