"""ZeRO 3 that takes each weight away as soon as it has its values: no rank ever holds the model.

`deepspeed.zero.Init` around the building would do so by itself, but before our weights are drawn, which is by their
names in the whole model. So DeepSpeed gets them module by module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron_ru.engines.deepspeed.config import Config, build_config
from megatron_ru.engines.deepspeed.groups import Groups
from megatron_ru.engines.deepspeed.support import import_deepspeed, quieten


class EarlySharding:
    """Called with weights that have their values, it keeps this rank's share of each.

    Until `end_early_sharding` they go on looking whole, for Megatron counts them and sorts them by their dimensions.
    All data-parallel ranks call it together, with the same weights in the same order. `given` is the user's JSON.
    """

    def __init__(self, given: Config):
        self._given = given
        self._sharded: Any = None

    def __call__(self, weights: Sequence[nn.Parameter]) -> None:
        from megatron.training import get_args

        args = get_args()
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        fresh: list[Any] = [weight for weight in weights if not is_sharded(weight)]
        if not fresh:
            return
        for weight in fresh:
            if dtype is not None:
                # As Megatron's Float16Module would, for which nothing is left here.
                weight.data = weight.data.to(dtype)
        if self._sharded is None:
            self._begin(args, fresh)
        else:
            self._sharded.convert_to_zero_parameters(param_list=fresh)
        for weight in fresh:
            weight.data = looking_whole(weight)

    def _begin(self, args: Any, weights: list[nn.Parameter]) -> None:
        deepspeed = import_deepspeed()
        from deepspeed.accelerator import get_accelerator

        quieten(self._given)
        groups = Groups()
        # Else DeepSpeed's settings are those of a single rank.
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
        # The settings with which the engine would shard what is left.
        deepspeed.zero.Init(
            module=nn.ParameterList(weights),
            data_parallel_group=groups.get_data_parallel_group(),
            config_dict_or_path=build_config(args, self._given, groups.get_data_parallel_world_size()),
            mpu=groups,
        )
        self._sharded = weights[0]


def end_early_sharding(model: nn.Module) -> None:
    """Leaves the model to DeepSpeed: sharded weights look empty, and what is not a weight lies on the device."""
    sharded = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    for parameter in sharded:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    if sharded:
        # DeepSpeed moves a model only when it shards it itself.
        model.cuda(torch.cuda.current_device())


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO 3 has taken the parameter."""
    return hasattr(parameter, "ds_id")


def looking_whole(parameter: Any) -> torch.Tensor:
    """One number, repeated in the shape of the whole parameter, that takes no memory."""
    one = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    return one.expand(parameter.ds_shape)
