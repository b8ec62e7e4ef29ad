"""The weights of an engine, and anything of their shapes, in Megatron's torch_dist checkpoints.

Each data-parallel rank gathers, writes and reads whole tensors, but only those that it owns: no rank ever holds more
than its share of them, and none of them writes what another one writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_ru.engines.deepspeed.engine_state import EngineState
from megatron_ru.engines.deepspeed.sharding_early import looking_whole

Shard = ShardedTensor | ShardedTensorFactory


class Weights:
    """The weights of ZeRO 0 to 2: every rank has all of them, and Megatron saves and loads them as always."""

    def __init__(self, core: Any, state: EngineState, group: Any):
        self.core = core
        self.group = group
        self._state = state
        self.parameters = {name: parameter for name, parameter in core.named_parameters() if parameter.requires_grad}
        sizes = [self.shape_of(parameter).numel() for parameter in self.parameters.values()]
        self.owners = dict(zip(self.parameters, balanced(sizes, group.size()), strict=True))

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """What Megatron writes into, or reads from, a checkpoint."""
        return self.core.sharded_state_dict(*arguments, **keywords)

    def load_state_dict(self, state_dict: Any, strict: bool) -> Any:
        """Takes over what was read."""
        result = self.core.load_state_dict(state_dict, strict=strict)
        self._state.refresh()
        return result

    def shape_of(self, parameter: Any) -> torch.Size:
        """The shape of the whole parameter on this tensor-parallel rank."""
        return parameter.shape

    def owns(self, name: str) -> bool:
        """Whether this rank writes and reads the parameter."""
        return self.owners[name] == self.group.rank()

    def shards(self, *arguments: Any, **keywords: Any) -> dict[str, Shard]:
        """Where each parameter belongs in a checkpoint, by its name in the model; the data are without meaning."""
        named = {id(parameter): name for name, parameter in self.parameters.items()}
        template = self.core.sharded_state_dict(*arguments, **keywords)
        found = {named.get(id(getattr(shard, "data", None))): shard for shard in template.values()}
        return {name: shard for name, shard in found.items() if name is not None}

    def hand_out(self, name: str, value: Tensor | None) -> Tensor:
        """The whole tensor on every rank and on the device, from the one that owns it and has read it."""
        parameter = self.parameters[name]
        device = torch.device("cuda", torch.cuda.current_device())
        if value is None:
            value = torch.empty(self.shape_of(parameter), dtype=torch.float32, device=device)
        value = value.to(device=device, dtype=torch.float32).contiguous()
        source = torch.distributed.get_global_rank(self.group, self.owners[name])
        torch.distributed.broadcast(value, source, group=self.group)
        return value


class ShardedWeights(Weights):
    """The weights of ZeRO 3: a rank has a part of each."""

    def __init__(self, core: Any, state: EngineState, group: Any):
        super().__init__(core, state, group)
        self._keys: dict[str, str] = {}

    def shape_of(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        with self._of_full_size():
            template = self.core.sharded_state_dict(*arguments, **keywords)
            named = {id(parameter): name for name, parameter in self.parameters.items()}
            places = {key: named.get(id(getattr(shard, "data", None))) for key, shard in template.items()}
        found = {}
        for key, shard in template.items():
            name = places[key]
            if name is None:
                found[key] = shard
                continue
            whole = self._gather(name)
            if whole is not None:
                found[key] = as_main_replica(shard, whole)
        self._keys = {name: key for key, name in places.items() if name is not None}
        return found

    def load_state_dict(self, state_dict: Any, strict: bool) -> Any:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        others = {key: value for key, value in state_dict.items() if key not in self._keys.values()}
        result = self.core.load_state_dict(others, strict=False)
        for name, parameter in self.parameters.items():
            value = self.hand_out(name, state_dict.get(self._keys[name]))
            with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(value)
        self._state.refresh()
        return result

    def shards(self, *arguments: Any, **keywords: Any) -> dict[str, Shard]:
        with self._of_full_size():
            return super().shards(*arguments, **keywords)

    def _gather(self, name: str) -> Tensor | None:
        """The whole weight in main memory where it is owned, None elsewhere."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        parameter = self.parameters[name]
        with GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True) if self.owns(name) else None

    @contextmanager
    def _of_full_size(self) -> Iterator[None]:
        """Inside, each parameter looks whole."""
        before = {}
        for parameter in self.parameters.values():
            if parameter.shape != parameter.ds_shape:
                before[parameter] = parameter.data
                parameter.data = looking_whole(parameter)
        try:
            yield
        finally:
            for parameter, data in before.items():
                parameter.data = data


def as_main_replica(shard: Shard, data: Tensor, prefix: str = "") -> Shard:
    """The shard with these data, which no other data-parallel rank has."""
    changes: dict[str, Any] = {"data": data, "replica_id": (*shard.replica_id[:-1], 0)}
    if prefix:
        changes["key"] = f"{prefix}.{shard.key}"
    if isinstance(shard, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(shard, **changes)


def balanced(sizes: list[int], ranks: int) -> list[int]:
    """For each size the rank that takes it: the largest first, each to whoever has least."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[index], loads[owner] = owner, loads[owner] + sizes[index]
    return owners
