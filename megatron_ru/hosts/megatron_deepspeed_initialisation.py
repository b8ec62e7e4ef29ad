"""Initial weights of a Megatron-DeepSpeed model that do not depend on how it is cut.

They are drawn as `models.initialisation` draws them, under the names that the same weights have in our own model: with
one seed both begin from the same numbers.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from megatron_ru.seams.seam import Seam

_LINEARS = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_IN_LAYER = re.compile(r"(?P<layers>.*\blayers\.)?(?P<number>\d+)\.(?P<linear>(?:self_attention|mlp)\.\w+)")
_EMBEDDING = re.compile(r"(?:.*\.)?(?P<table>word_embeddings|position_embeddings)(?:\.local_embeddings)?")
_HEAD = re.compile(r"(?:.*\.)?(?:output_layer|lm_head)")


def initialisation_seams(args: Namespace) -> list[Seam]:
    """The seams of `--ru-init whole`; none with ZeRO 3, whose ranks hold parts of each weight from the start, and none
    with experts."""
    if args.ru_init != "whole" or args.zero_stage == 3 or max(args.num_experts) > 1:
        return []
    from megatron_ru.models.initialisation import initialisation_seams as noting_seams

    def make(original: Callable[..., list[nn.Module]]) -> Callable[..., list[nn.Module]]:
        def get_model(*arguments: Any, **keywords: Any) -> list[nn.Module]:
            models = original(*arguments, **keywords)
            for model in models:
                draw_whole(model, args)
            return models

        return get_model

    built = Seam(target="megatron.training:get_model", make=make, reason="a script's model comes from its own function")
    return [*noting_seams(), built]


def draw_whole(model: nn.Module, args: Namespace) -> None:
    """Draws every parallel weight of a model, or of one stage of its pipeline, from the seed and its name alone."""
    from megatron.core import parallel_state

    from megatron_ru.models.initialisation import ShardedDraw, draw_weight, noted_draw

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    draw_embedding: Callable[..., Any] | None = None
    for name, module_name, module in names_in_our_model(model):
        weight = module.weight
        noted = noted_draw(weight)
        if noted is not None:
            if name.startswith("embedding."):
                draw_embedding = noted.draw
            # Gate and up projection lie in one weight.
            noted = replace(noted, stride=2) if args.swiglu and name.endswith("linear_fc1.weight") else noted
            draw_weight(weight, noted, args.seed, name, rank, size)
        elif draw_embedding is not None:
            # A table of positions, behind the words: whole on each rank, or cut by sequence parallelism.
            cut = module_name.endswith("local_embeddings")
            whole = ShardedDraw(draw=draw_embedding, partition_dim=0, stride=1)
            draw_weight(weight, whole, args.seed, name, rank if cut else 0, size if cut else 1)


def names_in_our_model(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(name of the weight in our model, the module's name in this one, module) of all whose weight is drawn.

    In DeepSpeed's pipeline the modules are numbered through, with the conversion of the input and the embedding first,
    and a layer knows its number; without it the layers are a list.
    """
    for module_name, module in model.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        if match := _IN_LAYER.fullmatch(module_name):
            number = int(match["number"]) if match["layers"] else model.get_submodule(match["number"]).layer_number
            if match["linear"] in _LINEARS:
                yield f"decoder.layers.{number}.{_LINEARS[match['linear']]}.weight", module_name, module
        elif match := _EMBEDDING.fullmatch(module_name):
            yield f"embedding.{match['table']}.weight", module_name, module
        elif _HEAD.fullmatch(module_name):
            yield "output_layer.weight", module_name, module
