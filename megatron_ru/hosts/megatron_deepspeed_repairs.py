"""What trains wrongly or crashes in a Megatron-DeepSpeed checkout, put right from outside.

Each repair is installed where a probe of the checkout's own code finds the fault, so that a checkout without it stays
as it is. The first three came with one change of December 2024 (chunked attention for very long sequences); commit
6acc370a before it has none of them, and the repaired checkout gives its losses.

| fault | what happens | found by |
| --- | --- | --- |
| rotary positions are cosines and sines, attention takes angles | wrong rotations, a crash in the pipeline | a call |
| query, key and value are cut in thirds | a crash with grouped queries; with TP another model for each TP | the code |
| query, key and value are views of one tensor | a crash in the plain attention for more than one sequence | the code |
| so are the keys of one group for each rank, always | the same | the arguments |
| a layer norm of the pipeline gets an argument that torch's has not | a crash on the CPU | the device |
| the pipeline sends a part of what sequence parallelism has cut already | wrong activations | the arguments |
| gradients of the norms are not summed over sequence-parallel ranks | drifting norms | the arguments |
"""

import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts.megatron_deepspeed_arguments import on_cpu
from megatron_ru.hosts.megatron_deepspeed_ops import layer_norm_seams
from megatron_ru.ops.backend import selected
from megatron_ru.seams.seam import Seam

_ATTENTION = "megatron.model.transformer:ParallelAttention"


def repair_seams(args: Namespace) -> list[Seam]:
    """The repairs that this checkout and these arguments need. Raises `UserError` where --ru-host-repairs none would
    train something else."""
    rotary = args.use_rotary_position_embeddings and rotary_positions_are_tables()
    if args.ru_host_repairs == "none":
        if rotary:
            raise UserError(
                "this Megatron-DeepSpeed takes the cosines and sines of --use-rotary-position-embeddings for angles "
                "and would train something else; drop --ru-host-repairs none, or check out commit 6acc370a"
            )
        return []
    seams = [_rotary_seam()] if rotary else []
    thirds = query_key_value_is_cut_in_thirds()
    seams += [_order_seam()] if thirds else []
    seams += [_contiguous_seam()] if thirds or _one_group_in_each_rank(args) else []
    if on_cpu() and args.normalization == "layernorm" and "layer_norm" not in selected():
        seams += layer_norm_seams(args)
    if args.sequence_parallel:
        seams += [_pipeline_seam(args), _norm_gradients_seam(args)]
    return seams


def rotary_positions_are_tables() -> bool:
    """Whether the host's rotary embedding gives a list of cosines and sines instead of angles."""
    from megatron.model.rotary_pos_embedding import RotaryEmbedding

    return isinstance(RotaryEmbedding(2)(1), list)


def query_key_value_is_cut_in_thirds() -> bool:
    """Whether attention takes its parts from the projection as three blocks, and not head by head."""
    from megatron.model.transformer import ParallelAttention

    return "split_tensor" not in inspect.unwrap(ParallelAttention.forward).__code__.co_names


def _one_group_in_each_rank(args: Namespace) -> bool:
    groups: int = args.num_key_value_heads
    return groups == args.tensor_model_parallel_size and groups != args.num_attention_heads


class RotaryAngles(Tensor):
    """Angles [sequence, 1, 1, rotary] fp32 that a consumer of (cosines, sines) hands on unharmed.

    It unpacks them, rounds both to its dtype and gives them to attention as the angles of queries and of keys: so they
    are both, and rounding leaves them alone (positions above 256 have no place of their own in bf16).
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iter__(self) -> Any:
        """Angles of the queries, angles of the keys."""
        return iter((self, self))

    def to(self, *arguments: Any, **keywords: Any) -> Tensor:
        """The angles on the device that was asked for, in fp32 whatever was asked for."""
        devices = [value for value in (*arguments, *keywords.values()) if isinstance(value, str | torch.device)]
        return super().to(devices[0]).as_subclass(RotaryAngles) if devices else self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Megatron keeps them in its arguments, which go into checkpoints: those must be read without us.
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _rotary_seam() -> Seam:
    def make(original: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(self: Any, max_seq_len: int, offset: int = 0) -> Tensor:
            kept = self.__dict__.get("_ru_angles")
            if kept is None or kept[0] != (max_seq_len, offset):
                positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
                angles = torch.outer(positions, self.inv_freq.float()).repeat(1, 2)
                # The same object each step: the op makes its tables once.
                kept = self.__dict__["_ru_angles"] = (
                    (max_seq_len, offset), angles[:, None, None, :].as_subclass(RotaryAngles),
                )  # fmt: skip
            return kept[1]

        return call

    return Seam(
        # Not forward: what ZeRO 3 hangs around it would give back a plain tensor.
        target="megatron.model.rotary_pos_embedding:RotaryEmbedding.__call__",
        make=make,
        reason="its cosines and sines are taken for angles",
    )


def _order_seam() -> Seam:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def build(self: Any, *arguments: Any, **keywords: Any) -> None:
            original(self, *arguments, **keywords)
            if not hasattr(self, "query_key_value"):
                return
            groups, size = self.num_key_value_groups, self.hidden_size_per_attention_head
            self.query_key_value.register_forward_hook(
                lambda module, given, result: (in_thirds(result[0], groups, size), *result[1:])
            )
            # Keys and values have as many heads as queries by then.
            self.use_gqa = False

        return build

    return Seam(
        target=f"{_ATTENTION}.__init__",
        make=make,
        expects=("config", "layer_number", "attention_type", "attn_mask_type"),
        reason="the projection's heads lie one after the other, each with its query, key and value",
    )


def in_thirds(mixed: Tensor, queries_per_key: int, head_size: int) -> Tensor:
    """[sequence, batch, 3·queries·head] with all queries, then all keys, then all values, of a projection [sequence,
    batch, groups·(queries per key + 2)·head]; the key and the value of a group once for each of its queries."""
    sequence, batch, _ = mixed.shape
    heads = mixed.view(sequence, batch, -1, queries_per_key + 2, head_size)
    queries, keys, values = heads.split([queries_per_key, 1, 1], dim=3)
    blocks = [block.expand_as(queries).reshape(sequence, batch, -1) for block in (queries, keys, values)]
    return torch.cat(blocks, dim=2)


def _contiguous_seam() -> Seam:
    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(
            self: Any, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, *rest: Any, **keywords: Any
        ) -> Tensor:
            parts = (part.contiguous() for part in (query_layer, key_layer, value_layer))
            return original(self, *parts, *rest, **keywords)

        return forward

    return Seam(
        target="megatron.model.transformer:CoreAttention.forward",
        make=make,
        expects=("query_layer", "key_layer", "value_layer", "attention_mask"),
        reason="it views each of them as [sequence, batch·heads, head]",
    )


def _pipeline_seam(args: Namespace) -> Seam:
    names = ("pipe_partitioned", "grad_partitioned")

    def make(original: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def create() -> dict[str, Any]:
            config = original()
            # The host takes the flag back where TP is 1.
            if not args.sequence_parallel:
                return config
            pipeline = config.setdefault("pipeline", {})
            wrong = [name for name in names if pipeline.get(name, False) is True]
            if wrong:
                raise UserError(
                    f"DeepSpeed's settings have {' and '.join(wrong)} true, with which each rank of "
                    "--sequence-parallel would send a part of its own part to the next stage; set them to false, or "
                    "drop --sequence-parallel"
                )
            pipeline.update(dict.fromkeys(names, False))
            return config

        return create

    return Seam(
        target="megatron.training:_create_ds_config_dict",
        make=make,
        reason="the pipeline engine takes activations for equal on all tensor-parallel ranks",
    )


def _norm_gradients_seam(args: Namespace) -> Seam:
    def make(original: Callable[..., list[nn.Module]]) -> Callable[..., list[nn.Module]]:
        def get_model(*arguments: Any, **keywords: Any) -> list[nn.Module]:
            models = original(*arguments, **keywords)
            if args.sequence_parallel:
                for model in models:
                    sum_gradients(model)
            return models

        return get_model

    return Seam(
        target="megatron.training:get_model",
        make=make,
        reason="DeepSpeed's engine reduces over the data-parallel ranks alone",
    )


def sum_gradients(model: nn.Module) -> None:
    """From now on the gradients of what is marked as sequence-parallel (norms, biases behind row-parallel linears)
    are sums over the tensor-parallel ranks, each of which has seen a part of the sequence."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    group = get_tensor_model_parallel_group()

    def total(gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(total)
