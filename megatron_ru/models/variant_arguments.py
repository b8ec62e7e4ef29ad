"""`--ru-variant NAME`: the arguments of Megatron-LM that a variant decides.

Sizes refine: an explicit `--num-layers 8` makes a shallower model of the same kind, and widths that depend
on what was refined are derived anew. Kinds (positions, norm, activation, biases, ratios) decide: an explicit
flag that says otherwise is an error. Destinations and flags are those of megatron/training/arguments.py, the
same in Megatron-LM core 0.16.1 to 0.20; those that a parser lacks are passed over.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.variant import Variant, find_variant

# Megatron's destination and the variant's field it refines.
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "seq_length": "seq_length",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "norm_epsilon",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
}

# Other architectures, or other spellings of a size; none of them is part of a variant.
_FOREIGN: dict[str, Any] = {
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
    "rotary_interleaved": False,
    "apply_residual_connection_post_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "encoder_num_layers": None,
    "decoder_num_layers": None,
    "encoder_seq_length": None,
    "yaml_cfg": None,
}

_TIE = "ru_tie_embeddings"
_UNTIE = "untie_embeddings_and_output_weights"
_ABSENT = object()


def extend_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser with `--ru-variant` and `--ru-tie-embeddings`; its namespaces carry `ru_variant`.

    Parsing raises `UserError` for an unknown variant, a flag that contradicts it, or sizes that do not fit.
    """
    group = parser.add_argument_group("megatron_ru")
    group.add_argument(
        "--ru-variant",
        metavar="NAME",
        default=None,
        help="architecture to train, one of `megatron-ru variants`; sizes given beside it refine it",
    )
    group.add_argument(
        "--ru-tie-embeddings",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one matrix for the embedding and the output projection, or two; default: as the variant says",
    )
    parse_plainly = parser.parse_known_args

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None, **keywords: Any
    ) -> tuple[argparse.Namespace, list[str]]:
        given = vars(namespace) if namespace is not None else {}
        # argparse leaves attributes alone that are there: what still holds the mark was not on the line.
        marks = {action.dest: _ABSENT for action in parser._actions if action.dest in _watched()}
        probe, _ = parse_plainly(args, argparse.Namespace(**{**marks, **given}), **keywords)
        if probe.ru_variant is None and getattr(probe, _TIE) not in (None, _ABSENT):
            raise UserError(
                "--ru-tie-embeddings refines a variant and there is none; add --ru-variant NAME, or use "
                "Megatron's --untie-embeddings-and-output-weights"
            )
        if probe.ru_variant is None:
            return parse_plainly(args, namespace, **keywords)
        explicit = {name: value for name in marks if (value := getattr(probe, name, _ABSENT)) is not _ABSENT}
        defaults = _defaults(find_variant(probe.ru_variant), explicit, parser, probe)
        prepared = argparse.Namespace(**given)
        for name, value in defaults.items():
            setattr(prepared, name, value)
        return parse_plainly(args, prepared, **keywords)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
    return parser


def megatron_arguments(variant: Variant) -> dict[str, Any]:
    """Values by Megatron's destination names for all that the variant decides, sizes and kinds."""
    values = {**_size_arguments(variant), **_kind_arguments(variant), **_fusion_arguments(variant)}
    return {dest: value for dest, value in values.items() if value is not None}


def variant_of(args: argparse.Namespace) -> Variant | None:
    """The variant that parsed arguments describe, its sizes refined by theirs; None without `--ru-variant`.

    The vocabulary stays the variant's own: a tokenizer's size is not known from arguments alone.
    """
    name = getattr(args, "ru_variant", None)
    if name is None:
        return None
    variant = find_variant(name)
    names = {*_size_fields(variant), _UNTIE} - {"vocab_size"}
    return refine(variant, {dest: value for dest in names if (value := getattr(args, dest, None)) is not None})


def refine(variant: Variant, sizes: Mapping[str, Any]) -> Variant:
    """The variant with sizes replaced, given by Megatron's destinations; widths derived from them follow.

    Raises `UserError` when they do not fit together.
    """
    changes = {name: sizes[dest] for dest, name in _size_fields(variant).items() if dest in sizes}
    if "seq_length" in changes and "max_position_embeddings" not in changes:
        # A table of learned positions keeps its rows in a shorter context.
        changes["max_position_embeddings"] = max(variant.position_count, changes["seq_length"])
    if _UNTIE in sizes:
        changes["tied_embeddings"] = not sizes[_UNTIE]
    if _TIE in sizes:
        changes["tied_embeddings"] = sizes[_TIE]
    return dataclasses.replace(variant, **changes)


def check_divisibility(args: argparse.Namespace, world_size: int) -> None:
    """Raises `UserError` where Megatron's parsed sizes do not divide among `world_size` processes.

    Covers what Megatron asserts with a traceback: DP = world / (TP·PP·CP), the global batch among
    micro-batches and DP, layers among pipeline stages, heads, query groups and widths among TP, the context
    among CP and TP.
    """
    size = functools.partial(_parsed_size, args)
    tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    cp = size("context_parallel_size")
    if world_size % (tp * pp * cp):
        raise UserError(
            f"{world_size} processes do not divide into model replicas of TP {tp} x PP {pp} x CP {cp} = "
            f"{tp * pp * cp}; start a multiple of {tp * pp * cp} processes or change the parallel sizes"
        )
    _check_batch(args, world_size // (tp * pp * cp))
    _check_layers(args, pp)
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if getattr(args, "kv_channels", None) is None:
        _require_multiple(hidden, heads, f"--hidden-size {hidden}", f"{heads} attention heads")
    groups = size("num_query_groups") if getattr(args, "group_query_attention", False) else heads
    _require_multiple(heads, groups, f"--num-attention-heads {heads}", f"{groups} query groups")
    _require_multiple(heads, tp, f"--num-attention-heads {heads}", f"tensor parallel size {tp}")
    if groups % tp and tp % groups:
        raise UserError(
            f"{groups} query groups are neither a multiple nor a divisor of tensor parallel size {tp}; "
            "change --tensor-model-parallel-size, or choose another variant"
        )
    ffn = getattr(args, "ffn_hidden_size", None) or hidden
    _require_multiple(ffn, tp, f"feed-forward width {ffn}", f"tensor parallel size {tp}")
    context = size("seq_length")
    if getattr(args, "sequence_parallel", False):
        _require_multiple(
            context,
            tp * cp,
            f"--seq-length {context}",
            f"sequence parallel over TP {tp} x CP {cp} = {tp * cp}",
        )
    if cp > 1:
        # Each rank holds one chunk from the front and one from the back, to balance causal attention.
        _require_multiple(context, 2 * cp, f"--seq-length {context}", f"2 x context parallel size {cp}")


def _check_batch(args: argparse.Namespace, replicas: int) -> None:
    micro = getattr(args, "micro_batch_size", None)
    batch = getattr(args, "global_batch_size", None)
    if micro is not None and micro < 1:
        raise UserError(f"--micro-batch-size is {micro}, expected at least 1")
    if micro is not None and batch is not None and (batch < 1 or batch % (micro * replicas)):
        raise UserError(
            f"--global-batch-size {batch} does not divide by micro-batch size {micro} x data parallel size "
            f"{replicas} = {micro * replicas}; use a multiple of {micro * replicas}"
        )


def _check_layers(args: argparse.Namespace, stages: int) -> None:
    uneven = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
    )
    if any(getattr(args, name, None) is not None for name in uneven):
        return
    layers = _parsed_size(args, "num_layers")
    extra = [
        word
        for word, name in (("embedding", "embedding"), ("output", "loss"))
        if getattr(args, f"account_for_{name}_in_pipeline_split", False)
    ]
    total = layers + len(extra)
    what = f"--num-layers {layers}" + "".join(f" + 1 for the {word}" for word in extra)
    _require_multiple(total, stages, what, f"pipeline parallel size {stages}")
    per_virtual = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    per_rank = getattr(args, "num_virtual_stages_per_pipeline_rank", None)
    share = f"{total // stages} layers per pipeline stage"
    if per_virtual is not None:
        _require_multiple(total // stages, per_virtual, share, f"--num-layers-per-virtual-pipeline-stage {per_virtual}")
    elif per_rank is not None:
        _require_multiple(total // stages, per_rank, share, f"--num-virtual-stages-per-pipeline-rank {per_rank}")


def _parsed_size(args: argparse.Namespace, name: str) -> int:
    value = getattr(args, name, None)
    flag = "--" + name.replace("_", "-")
    if value is None:
        if name.endswith("_parallel_size"):
            return 1
        raise UserError(f"{flag} is missing; give it, or choose an architecture with --ru-variant")
    if value < 1:
        raise UserError(f"{flag} is {value}, expected at least 1")
    return int(value)


def _require_multiple(value: int, divisor: int, value_words: str, divisor_words: str) -> None:
    if divisor < 1 or value % divisor:
        raise UserError(f"{value_words} does not divide by {divisor_words}; change one of them")


def command_line(variant: Variant) -> list[str]:
    """Flags of stock Megatron-LM that stand for the variant, as words of a command line."""
    values = megatron_arguments(variant)
    words: list[str] = []
    for dest, flag in _VALUE_FLAGS.items():
        if dest in values:
            words += [flag, str(values[dest])]
    for dest, (flag, value) in _SWITCHES.items():
        if values.get(dest) == value:
            words.append(flag)
    return words


def beyond_megatron(variant: Variant) -> list[str]:
    """What of the variant stock flags cannot say and `--ru-variant` must; empty when they say it all."""
    missing = []
    if variant.positions.startswith("sinusoidal"):
        missing.append(f"{variant.positions} positions")
    if variant.norm_placement == "post":
        missing.append("post-norm")
    if variant.activation not in {"gelu", "gelu_tanh", "swiglu"}:
        missing.append(f"activation {variant.activation}")
    if variant.activation == "gelu_tanh" and not variant.bias:
        missing.append("activation gelu_tanh without biases")
    return missing


def _size_fields(variant: Variant) -> dict[str, str]:
    rotary = {"rotary_base": "rotary_base"} if variant.positions == "rope" else {}
    return {**_SIZES, **rotary}


def _size_arguments(variant: Variant) -> dict[str, Any]:
    values = {dest: getattr(variant, name) for dest, name in _size_fields(variant).items()}
    values["max_position_embeddings"] = variant.position_count
    values[_UNTIE] = not variant.tied_embeddings
    return values


def _kind_arguments(variant: Variant) -> dict[str, Any]:
    rotary = variant.positions == "rope"
    values = {
        "ffn_hidden_size": variant.ffn_hidden_size,
        "group_query_attention": variant.query_heads_per_kv_head > 1,
        "num_query_groups": variant.num_query_groups,
        "kv_channels": variant.head_size,
        # Megatron knows no sinusoidal positions; our model puts the fixed table in the place of the learned one.
        "position_embedding_type": {
            "rope": "rope",
            "learned": "learned_absolute",
            "sinusoidal": "learned_absolute",
        }.get(variant.positions, "none"),
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[variant.norm],
        # Every gated activation has SwiGLU's shapes; this keeps Megatron's sizes and FLOP counts right.
        "swiglu": variant.gated,
        "add_bias_linear": variant.bias,
        "add_qkv_bias": variant.bias,
        **_FOREIGN,
    }
    if rotary:
        values["rotary_percent"] = variant.rotary_percent
    else:
        values["rotary_base"] = None
        values["rotary_percent"] = None
        values["use_rotary_position_embeddings"] = False
        # Deprecated, and with RoPE a habit of many scripts.
        values["add_position_embedding"] = True
    return values


def _fusion_arguments(variant: Variant) -> dict[str, Any]:
    """Megatron fuses biases with the tanh form of GELU and with SwiGLU; others must not meet those."""
    if variant.gated:
        return {} if variant.activation == "swiglu" else {"bias_swiglu_fusion": False}
    return {} if variant.activation == "gelu_tanh" and variant.bias else {"bias_gelu_fusion": False}


def _watched() -> set[str]:
    """Destinations for which it matters whether the user gave them."""
    sizes = {*_SIZES, "rotary_base", _UNTIE, _TIE}
    kinds = {"rotary_percent", "use_rotary_position_embeddings", "add_position_embedding", *_FOREIGN}
    return sizes | kinds | set(_MEANINGS) | {"bias_gelu_fusion", "bias_swiglu_fusion"} | _RECIPE_ARGUMENTS


def _defaults(
    variant: Variant, explicit: dict[str, Any], parser: argparse.ArgumentParser, probe: argparse.Namespace
) -> dict[str, Any]:
    """What the parser's defaults become, less what the user gave. Raises `UserError` on a contradiction."""
    flags = _Flags(parser)
    explicit_tie = explicit.pop(_TIE, None)
    if explicit_tie and explicit.get(_UNTIE):
        raise UserError(f"{flags.spell(_UNTIE, True)} contradicts --ru-tie-embeddings; drop one of the two flags")
    sizes = dict(explicit) if explicit_tie is None else {**explicit, _TIE: explicit_tie}
    refined = refine(variant, sizes)
    decided = _kind_arguments(refined)
    for dest, value in explicit.items():
        if dest in decided and value != decided[dest] and not _same_heads(dest, explicit, refined):
            meaning = _MEANINGS.get(dest, _unset)(refined)
            raise UserError(
                f"{flags.spell(dest, value)} contradicts --ru-variant {variant.name}, which decides "
                f"{meaning}; drop the flag or choose another variant"
            )
    values = megatron_arguments(refined)
    values.update({dest: value for dest, value in refined.recipe.items() if dest in _RECIPE_ARGUMENTS})
    vocabulary = values.pop("vocab_size")
    if _wants_vocabulary(getattr(probe, "tokenizer_type", None)):
        # Up to core 0.17 the null tokenizer counts an end-of-document token on top of --vocab-size.
        counted_apart = "tokenizer_type" in flags.known and "null_tokenizer_eod_id" not in flags.known
        values["vocab_size"] = vocabulary - int(counted_apart)
    return {dest: value for dest, value in values.items() if dest in flags.known and dest not in explicit}


def _same_heads(dest: str, explicit: Mapping[str, Any], refined: Variant) -> bool:
    """As many groups as heads is multi-head attention, in other words."""
    return dest == "group_query_attention" and explicit.get("num_query_groups") == refined.num_attention_heads


def _wants_vocabulary(tokenizer_type: str | None) -> bool:
    """A null tokenizer has the size it is told; a real one its own (Tiktoken's would be cut to ours)."""
    return tokenizer_type is None or tokenizer_type.startswith("Null")


def _unset(variant: Variant) -> str:
    return "an architecture without it"


_MEANINGS: dict[str, Callable[[Variant], str]] = {
    "ffn_hidden_size": lambda v: f"{v.ffn_hidden_size} (C = {v.mlp_ratio:.4g} times hidden size {v.hidden_size})",
    "group_query_attention": lambda v: (
        f"{v.num_query_groups} query groups ({v.query_heads_per_kv_head} query heads each)"
    ),
    "num_query_groups": lambda v: (
        f"{v.num_query_groups} ({v.num_attention_heads} heads, {v.query_heads_per_kv_head} query heads each)"
    ),
    "kv_channels": lambda v: f"{v.head_size}",
    "position_embedding_type": lambda v: f"{v.positions} positions",
    "use_rotary_position_embeddings": lambda v: f"{v.positions} positions",
    "add_position_embedding": lambda v: f"{v.positions} positions",
    "rotary_base": lambda v: f"{v.positions} positions",
    "rotary_percent": lambda v: f"{v.rotary_percent}" if v.positions == "rope" else f"{v.positions} positions",
    "normalization": lambda v: {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[v.norm],
    "apply_residual_connection_post_layernorm": lambda v: f"{v.norm_placement}-norm",
    "swiglu": lambda v: f"the activation {v.activation}",
    "squared_relu": lambda v: f"the activation {v.activation}",
    "quick_geglu": lambda v: f"the activation {v.activation}",
    "openai_gelu": lambda v: f"the activation {v.activation}",
    "add_bias_linear": lambda v: "linear layers with biases" if v.bias else "linear layers without biases",
    "add_qkv_bias": lambda v: "linear layers with biases" if v.bias else "linear layers without biases",
    "encoder_num_layers": lambda v: f"a decoder of {v.num_layers} layers (refine it with --num-layers)",
    "decoder_num_layers": lambda v: f"a decoder of {v.num_layers} layers (refine it with --num-layers)",
    "encoder_seq_length": lambda v: f"a context of {v.seq_length} (refine it with --seq-length)",
    "yaml_cfg": lambda v: "the model that the file would replace",
}

# Of a recipe only these become defaults: they fit a run of any length and batch.
_RECIPE_ARGUMENTS = {
    "adam_beta1", "adam_beta2", "adam_eps", "lr", "weight_decay", "lr_decay_style", "clip_grad",
}  # fmt: skip

_VALUE_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "seq_length": "--seq-length",
    "max_position_embeddings": "--max-position-embeddings",
    "vocab_size": "--vocab-size",
    "position_embedding_type": "--position-embedding-type",
    "rotary_base": "--rotary-base",
    "rotary_percent": "--rotary-percent",
    "normalization": "--normalization",
    "layernorm_epsilon": "--norm-epsilon",
    "attention_dropout": "--attention-dropout",
    "hidden_dropout": "--hidden-dropout",
}

# The switch and the value for which it is written.
_SWITCHES: dict[str, tuple[str, bool]] = {
    "group_query_attention": ("--group-query-attention", True),
    "swiglu": ("--swiglu", True),
    "add_bias_linear": ("--disable-bias-linear", False),
    _UNTIE: ("--untie-embeddings-and-output-weights", True),
    "bias_gelu_fusion": ("--no-bias-gelu-fusion", False),
    "bias_swiglu_fusion": ("--no-bias-swiglu-fusion", False),
}


class _Flags:
    """How a parser spells its destinations."""

    def __init__(self, parser: argparse.ArgumentParser):
        self._actions: dict[str, list[argparse.Action]] = {}
        for action in parser._actions:
            if action.option_strings:
                self._actions.setdefault(action.dest, []).append(action)

    @property
    def known(self) -> set[str]:
        """Destinations that have a flag."""
        return set(self._actions)

    def spell(self, dest: str, value: Any) -> str:
        """`--flag value`, or the switch that stores the value."""
        for action in self._actions[dest]:
            if action.nargs == 0 and action.const == value:
                return action.option_strings[0]
        return f"{self._actions[dest][0].option_strings[0]} {value}"
