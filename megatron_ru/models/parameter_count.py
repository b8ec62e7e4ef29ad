"""How many parameters a variant has, by formula and by building it on torch's meta device."""

import functools
from typing import TYPE_CHECKING

from megatron_ru.models.variant import Variant

if TYPE_CHECKING:
    from torch import nn


def count_parameters(variant: Variant, tied: bool | None = None) -> int:
    """Number of parameters; `tied` shares the embedding with the output projection (None: the variant's own).

    With h channels, L layers, V tokens, a = heads·head size, g = key-value heads·head size, f = feed-forward
    width and m matrices in the feed-forward block (3 when gated, else 2):

        V·h + L·(2·h·a + 2·h·g + m·h·f + norms) + final norm [+ V·h when untied] [+ positions·h when learned]

    and, per layer with biases, a + 2·g + h for attention and (m - 1)·f + h for the feed-forward block.
    A LayerNorm has 2·h parameters, an RMSNorm h; a layer has two norms. Vocabulary padding is not counted.
    """
    hidden, width = variant.hidden_size, variant.ffn_hidden_size
    query = variant.num_attention_heads * variant.head_size
    key = variant.num_query_groups * variant.head_size
    matrices = 3 if variant.gated else 2
    norm = hidden * (2 if variant.norm == "layernorm" else 1)

    layer = 2 * hidden * query + 2 * hidden * key + matrices * hidden * width + 2 * norm
    if variant.bias:
        layer += query + 2 * key + hidden + (matrices - 1) * width + hidden
    total = variant.vocab_size * hidden + variant.num_layers * layer
    if not _is_tied(variant, tied):
        total += variant.vocab_size * hidden
    if variant.positions == "learned":
        total += variant.position_count * hidden
    if variant.final_norm:
        total += norm
    return total


def parameters_on_meta(variant: Variant, tied: bool | None = None) -> int:
    """The same number, counted on modules built on the meta device: no memory is taken, whatever the size.

    One layer stands for all of them; they are alike, and a table of variants is then ready in a second.
    """
    model = build_on_meta(variant, tied)
    total = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.get_submodule("layer").parameters())
    return total + (variant.num_layers - 1) * layer


def build_on_meta(variant: Variant, tied: bool | None = None) -> "nn.Module":
    """The variant's modules with a single layer, on the meta device and without a forward: shapes only."""
    import torch
    from torch import nn

    hidden, width, bias = variant.hidden_size, variant.ffn_hidden_size, variant.bias
    query = variant.num_attention_heads * variant.head_size
    key = variant.num_query_groups * variant.head_size
    norm = functools.partial(nn.LayerNorm if variant.norm == "layernorm" else nn.RMSNorm, hidden)

    with torch.device("meta"):
        model = nn.ModuleDict({"embedding": nn.Embedding(variant.vocab_size, hidden)})
        if variant.positions == "learned":
            model["positions"] = nn.Embedding(variant.position_count, hidden)
        model["layer"] = nn.ModuleDict(
            {
                "attention_norm": norm(),
                "query_key_value": nn.Linear(hidden, query + 2 * key, bias=bias),
                "attention_output": nn.Linear(query, hidden, bias=bias),
                "feed_forward_norm": norm(),
                "feed_forward_in": nn.Linear(hidden, width * (2 if variant.gated else 1), bias=bias),
                "feed_forward_out": nn.Linear(width, hidden, bias=bias),
            }
        )
        if variant.final_norm:
            model["final_norm"] = norm()
        model["output"] = nn.Linear(hidden, variant.vocab_size, bias=False)
    if _is_tied(variant, tied):
        model["output"].weight = model["embedding"].weight
    return model


def _is_tied(variant: Variant, tied: bool | None) -> bool:
    return variant.tied_embeddings if tied is None else tied
