"""Initial weights that do not depend on how the model is cut.

Megatron draws each shard from the random state of its rank, so that TP=2 and TP=1, or PP=2 and PP=1, begin from
different models and their losses cannot be compared. Here each parallel weight is drawn whole, from a state
derived from the seed and the weight's name in the whole model, and the rank keeps its shard.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ru.seams.seam import Seam

_MARK = "megatron_ru_initialisation"


@dataclass(frozen=True, kw_only=True)
class ShardedDraw:
    """How the whole of a sharded weight is drawn and cut."""

    draw: Callable[[Tensor], Any]
    """Fills a tensor in place."""
    partition_dim: int
    """The dimension that tensor parallelism cuts."""
    stride: int
    """How many blocks are cut one by one along it: 2 where gate and up projection lie in one weight."""


def initialisation_seams() -> list[Seam]:
    """Seams that keep Megatron's linears and embeddings from drawing their shards, and note how they would have."""
    reason = "shards are drawn from per-rank random states, which ties the weights to the parallel layout"
    return [
        Seam(
            target="megatron.core.tensor_parallel.layers:_initialize_affine_weight_gpu",
            make=_note_gpu_draw,
            expects=("weight", "init_method", "partition_dim", "stride"),
            reason=reason,
        ),
        Seam(
            target="megatron.core.tensor_parallel.layers:_initialize_affine_weight_cpu",
            make=_note_cpu_draw,
            expects=("weight", "init_method", "partition_dim", "stride"),
            reason=reason,
        ),
    ]


def initialise(model: nn.Module, seed: int) -> None:
    """Draws every parallel weight of a `GPTModel` stage; the result depends on the seed and the names alone."""
    for module_name, module in model.named_modules():
        initialise_own(model, module_name, module, seed)


def initialise_own(model: nn.Module, module_name: str, module: nn.Module, seed: int) -> None:
    """`initialise` for the weights of one module of the stage without those of its children."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in _whole_model_names(model, module_name, module):
        noted: ShardedDraw | None = getattr(parameter, _MARK, None)
        device = parameter.device
        if noted is None:
            if not isinstance(module, nn.Embedding):
                continue
            draw = getattr(model.config, "embedding_init_method", None) or model.config.init_method
            noted, rank_, size_ = ShardedDraw(draw=draw, partition_dim=0, stride=1), 0, 1
        else:
            rank_, size_ = rank, size
            if model.config.use_cpu_initialization:
                # A weight that was built on meta lies where it is trained by now.
                device = torch.device("cpu")
        stride = noted.stride
        if name.endswith("mlp.linear_fc1.weight") and module.config.gated_linear_unit:
            # Gate and up projection lie in one weight; megatron-core before 0.17 does not say so.
            stride = 2
        with torch.no_grad():
            _draw_shard(noted, stride, parameter, device, _state(seed, name), rank_, size_)


def noted_draw(parameter: Tensor) -> ShardedDraw | None:
    """How a weight that was built under `initialisation_seams` would have been drawn; None for one that is not
    parallel."""
    return getattr(parameter, _MARK, None)


def draw_weight(shard: Tensor, noted: ShardedDraw, seed: int, name: str, rank: int, size: int) -> None:
    """Fills rank's `shard` of a weight, of `size` shards, with what the seed and its name in the whole model give."""
    with torch.no_grad():
        _draw_shard(noted, noted.stride, shard, shard.device, _state(seed, name), rank, size)


def draws(parameter: nn.Parameter) -> bool:
    """Whether `initialise` knows how this weight is drawn."""
    return hasattr(parameter, _MARK)


def _draw_shard(
    noted: ShardedDraw, stride: int, shard: Tensor, device: torch.device, state: int, rank: int, size: int
) -> None:
    """Fills `shard` with its part of the whole weight, which alone is in memory on `device` meanwhile."""
    dim, shape = noted.partition_dim, list(shard.shape)
    shape[dim] *= size
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    devices = [device] if whole.is_cuda else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.default_generator.manual_seed(state)
        if whole.is_cuda:
            torch.cuda.manual_seed(state)
        noted.draw(whole)
    for own, block in zip(shard.chunk(stride, dim), whole.chunk(stride, dim), strict=True):
        own.copy_(block.chunk(size, dim)[rank])


def _state(seed: int, name: str) -> int:
    """63 bits from the seed and the name; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _whole_model_names(model: nn.Module, module_name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the whole model, parameter) of each parameter that a module of one pipeline stage has itself.

    Layers count from the first of the whole model. A tied output layer on the last stage is the embedding.
    """
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    match = re.match(r"((?:.*\.)?layers)\.(\d+)(.*)", module_name)
    if match:
        layer = model.get_submodule(f"{match[1]}.{match[2]}")
        module_name = f"{match[1]}.{layer.layer_number - 1}{match[3]}"
    for short, parameter in module.named_parameters(recurse=False):
        name = f"{module_name}.{short}"
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def _note_gpu_draw(original: Callable[..., None]) -> Callable[..., None]:
    def note(
        weight: Tensor, init_method: Any, partition_dim: int, stride: int = 1, *rest: Any, **keywords: Any
    ) -> None:
        # The original also marks the weight as parallel; it does so with nothing drawn.
        original(weight, _draw_nothing, partition_dim, stride, *rest, **keywords)
        setattr(weight, _MARK, ShardedDraw(draw=init_method, partition_dim=partition_dim, stride=stride))

    return note


def _note_cpu_draw(original: Callable[..., Any]) -> Callable[..., Any]:
    def note(
        weight: Tensor, output_size: int, input_size: int, per_partition_size: int, partition_dim: int,
        init_method: Any, stride: int = 1, return_master_weight: bool = False, **keywords: Any,
    ) -> Any:  # fmt: skip
        drawn = original(
            weight, output_size, input_size, per_partition_size, partition_dim,
            init_method if return_master_weight else torch.nn.init.zeros_, stride, return_master_weight, **keywords,
        )  # fmt: skip
        setattr(weight, _MARK, ShardedDraw(draw=init_method, partition_dim=partition_dim, stride=stride))
        return drawn

    return note


def _draw_nothing(weight: Tensor) -> Tensor:
    return weight
