"""`--ru-variant NAME` in the words of Megatron-DeepSpeed's parser, as far as they go.

The rules are those of `models.variant_arguments`: sizes refine, kinds decide, and an explicit flag that says otherwise
is an error. What the host has no argument for is refused: its model is its own, and no layer spec can change it.
"""

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.variant import Variant, find_variant
from megatron_ru.models.variant_arguments import refine

_ABSENT = object()

# The host's destination, and ours in `refine`.
_SIZES = {
    name: name
    for name in (
        "num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings",
        "layernorm_epsilon", "attention_dropout", "hidden_dropout", "untie_embeddings_and_output_weights",
    )
} | {"rope_theta": "rotary_base"}  # fmt: skip

_RECIPE = ("adam_beta1", "adam_beta2", "adam_eps", "lr", "weight_decay", "lr_decay_style", "clip_grad")


def add_variants(parser: ArgumentParser) -> None:
    """Gives the parser's `--ru-variant` its meaning.

    Parsing raises `UserError` for an unknown variant, for one that the host cannot build, and for a flag that
    contradicts it.
    """
    parse = parser.parse_known_args
    known = {action.dest for action in parser._actions}

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        # argparse leaves attributes alone that are there: what still holds the mark was not on the line.
        probe, _ = parse(args, Namespace(**dict.fromkeys(known - {"ru_variant", "help"}, _ABSENT)))
        tie = None if probe.ru_tie_embeddings is _ABSENT else probe.ru_tie_embeddings
        if probe.ru_variant is None:
            if tie is not None:
                raise UserError(
                    "--ru-tie-embeddings refines a variant and there is none; add --ru-variant NAME, or use "
                    "Megatron's --untie-embeddings-and-output-weights"
                )
            return parse(args, namespace)
        explicit = {dest: value for dest in known if (value := getattr(probe, dest, _ABSENT)) is not _ABSENT}
        values = _values(find_variant(probe.ru_variant), explicit, tie, _Spelling(parser))
        prepared = Namespace(**(vars(namespace) if namespace is not None else {}))
        for dest, value in values.items():
            if dest in known and dest not in explicit:
                setattr(prepared, dest, value)
        return parse(args, prepared)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def host_arguments(variant: Variant) -> dict[str, Any]:
    """Values by the host's destinations for all that the variant decides, sizes and kinds.

    Raises `UserError` for what the host cannot build.
    """
    missing = beyond_host(variant)
    if missing:
        raise UserError(
            f"--ru-variant {variant.name} has {' and '.join(missing)}, which Megatron-DeepSpeed has no argument for; "
            "train it with megatron-ru pretrain_gpt, or choose another variant"
        )
    sizes = {
        "num_layers": variant.num_layers,
        "hidden_size": variant.hidden_size,
        "num_attention_heads": variant.num_attention_heads,
        "seq_length": variant.seq_length,
        "max_position_embeddings": variant.position_count,
        "layernorm_epsilon": variant.norm_epsilon,
        "attention_dropout": variant.attention_dropout,
        "hidden_dropout": variant.hidden_dropout,
        "untie_embeddings_and_output_weights": not variant.tied_embeddings,
    }
    return sizes | _kinds(variant)


def beyond_host(variant: Variant) -> list[str]:
    """What of the variant the host's arguments cannot say; empty when they say it all."""
    missing = []
    if variant.positions.startswith("sinusoidal"):
        missing.append(f"{variant.positions} positions")
    if variant.norm_placement == "post":
        missing.append("post-norm")
    if variant.activation not in ("gelu", "gelu_tanh", "swiglu"):
        missing.append(f"activation {variant.activation}")
    if variant.activation == "gelu_tanh" and not variant.bias:
        missing.append("activation gelu_tanh without biases")
    return missing


def _kinds(variant: Variant) -> dict[str, Any]:
    rotary = variant.positions == "rope"
    return {
        "ffn_hidden_size": variant.ffn_hidden_size,
        "num_key_value_heads": variant.num_query_groups,
        "kv_channels": variant.head_size,
        "use_rotary_position_embeddings": rotary,
        "add_position_embedding": variant.positions == "learned",
        "normalization": variant.norm,
        "swiglu": variant.activation == "swiglu",
        # The host's fused bias and GELU is the tanh form, its plain GELU the exact one.
        "bias_gelu_fusion": variant.activation == "gelu_tanh",
        "add_bias_linear": variant.bias,
        "squared_relu": False,
        "openai_gelu": False,
        "onnx_safe": None,
        "apply_residual_connection_post_layernorm": False,
        "apply_layernorm_1p": False,
        "num_experts": [1],
        **({"rope_theta": variant.rotary_base, "rotary_percent": variant.rotary_percent} if rotary else {}),
    }


def _values(variant: Variant, explicit: dict[str, Any], tie: bool | None, spelling: "_Spelling") -> dict[str, Any]:
    """What the parser's defaults become. Raises `UserError` on a contradiction."""
    sizes = {ours: explicit[dest] for dest, ours in _SIZES.items() if dest in explicit}
    if tie is not None:
        if tie and explicit.get("untie_embeddings_and_output_weights"):
            raise UserError(
                "--untie-embeddings-and-output-weights contradicts --ru-tie-embeddings; drop one of the two flags"
            )
        sizes["ru_tie_embeddings"] = tie
    if variant.positions != "rope":
        sizes.pop("rotary_base", None)
    refined = refine(variant, sizes)
    values = host_arguments(refined)
    decided = {dest: value for dest, value in values.items() if dest not in _SIZES or dest == "rope_theta"}
    if refined.positions == "rope":
        decided.pop("rope_theta")
    for dest, value in decided.items():
        if dest in explicit and explicit[dest] != value:
            raise UserError(
                f"{spelling(dest, explicit[dest])} contradicts --ru-variant {variant.name}, which decides "
                f"{dest.replace('_', ' ')} = {value}; drop the flag or choose another variant"
            )
    values |= {dest: value for dest, value in refined.recipe.items() if dest in _RECIPE}
    if explicit.get("tokenizer_type") == "NullTokenizer" and "vocab_size" not in explicit:
        # The null tokenizer counts an end-of-document token on top.
        values["vocab_size"] = refined.vocab_size - 1
    return values


class _Spelling:
    """How a parser spells a value of a destination: `--flag value`, or the switch that stores it."""

    def __init__(self, parser: ArgumentParser):
        self._actions: dict[str, list[argparse.Action]] = {}
        for action in parser._actions:
            if action.option_strings:
                self._actions.setdefault(action.dest, []).append(action)

    def __call__(self, dest: str, value: Any) -> str:
        for action in self._actions[dest]:
            if action.nargs == 0 and action.const == value:
                return action.option_strings[0]
        words = value if isinstance(value, list) else [value]
        return " ".join([self._actions[dest][0].option_strings[0], *map(str, words)])
