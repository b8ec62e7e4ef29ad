"""The model chunk that Megatron's loop holds: around it the loop is Megatron's, inside it the engine is DeepSpeed's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model, get_model_config

if TYPE_CHECKING:
    from megatron_ru.engines.deepspeed.weights import Weights


class EngineModel(MegatronModule):
    """Stands where Megatron's DistributedDataParallel stands; `start` gives it its engine."""

    force_all_reduce = False
    """Megatron sets it for steps whose gradients it writes down, which are refused here."""

    def __init__(self, module: torch.nn.Module):
        super().__init__(config=get_model_config(module))
        self.module = module
        # Not a submodule: the engine is a module around ours.
        self.__dict__["engine"] = None
        self.__dict__["_weights"] = None

    def start(self, engine: Any, weights: "Weights") -> None:
        """From now on forward passes go through the engine, and checkpoints through `weights`."""
        self.__dict__["engine"], self.__dict__["_weights"] = engine, weights
        config = self.config
        # All but the last micro-batch of a step are inside it: so the engine learns which one is the last.
        config.no_sync_func = self.between_steps
        # The engine has reduced the gradients by the time Megatron would.
        config.finalize_model_grads_func = _nothing

    @property
    def core(self) -> Any:
        """Megatron's model without anything around it."""
        return unwrapped(self.module)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the model gives."""
        return (self.__dict__["engine"] or self.module)(*arguments, **keywords)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Backward passes inside are followed by others of the same step."""
        engine = self.__dict__["engine"]
        engine.set_gradient_accumulation_boundary(False)
        yield
        engine.set_gradient_accumulation_boundary(True)

    def train(self, mode: bool = True) -> "EngineModel":
        """Dropout and the like on or off."""
        super().train(mode)
        if self.__dict__["engine"] is not None:
            self.__dict__["engine"].train(mode)
        return self

    def zero_grad_buffer(self) -> None:
        """Nothing: the engine has forgotten the gradients of the step before."""

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """The weights as Megatron writes and reads them."""
        weights = self.__dict__["_weights"]
        if weights is None:
            return self.core.sharded_state_dict(*arguments, **keywords)
        return weights.sharded_state_dict(*arguments, **keywords)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Takes over what was read."""
        weights = self.__dict__["_weights"]
        if weights is None:
            return self.core.load_state_dict(state_dict, strict=strict)
        return weights.load_state_dict(state_dict, strict)


def unwrapped(module: Any) -> Any:
    """The GPTModel in whatever is around it."""
    return get_attr_wrapped_model(module, "share_embeddings_and_output_weights", return_model_obj=True)


def add_tensor_parallel_sums(model: EngineModel, group: Any) -> None:
    """Gradients that tensor-parallel ranks hold in parts are summed as soon as they are there, since ZeRO reduces and
    shards them during the backward pass. Megatron sums the same ones at its end."""
    if group.size() == 1:
        return
    config = model.config
    for name, parameter in model.core.named_parameters():
        if not parameter.requires_grad:
            continue
        average = getattr(parameter, "average_gradients_across_tp_domain", False)
        in_parts = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        head_norm = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if average or in_parts or head_norm:
            parameter.register_hook(_summing(group, group.size() if average else 1))


def _summing(group: Any, divisor: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def add_up(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total if divisor == 1 else total.div_(divisor)

    return add_up


def _nothing(*arguments: Any, **keywords: Any) -> None:
    return None
