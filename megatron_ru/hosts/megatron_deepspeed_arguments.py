"""Our flags in Megatron-DeepSpeed's parser, and defaults that are true of this machine."""

import argparse
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts.megatron_deepspeed_variants import add_variants
from megatron_ru.models.variant_arguments import check_divisibility
from megatron_ru.plugin import arguments

CARRIED_OUT = frozenset(
    ("ru_variant", "ru_tie_embeddings", "device", "ru_metrics", "ru_init", "ru_ops", "ru_exit_signals")
)
"""Destinations of our flags that mean something to this host; the others are refused when they are given."""


def extend_parser(parser: ArgumentParser, when_parsed: Callable[[Namespace], None]) -> ArgumentParser:
    """The same parser with our flags; after the words are parsed the sizes are checked (`UserError`), and
    `when_parsed` is called with the namespace."""
    group = parser.add_argument_group(title="megatron_ru")
    flags = _our_flags()
    for action in flags:
        group._add_action(action)
    refused = {action.dest: action for action in flags if action.dest not in CARRIED_OUT}
    group.add_argument(
        "--ru-host-repairs", choices=["all", "none"], default="all",
        help="Megatron-DeepSpeed only: put right what trains wrongly or crashes in the checkout at hand (all), or "
        "leave it as it is (none).",
    )  # fmt: skip
    _set_machine_defaults(parser)
    add_variants(parser)
    _finish_after_parsing(parser, refused, when_parsed)
    return parser


def _our_flags() -> list[argparse.Action]:
    """The flags that we add to Megatron-LM's parser, without Megatron-LM."""
    ours = arguments.extend_parser(ArgumentParser(add_help=False, allow_abbrev=False))
    return [action for action in ours._actions if action.dest == "device" or action.dest.startswith("ru_")]


def _set_machine_defaults(parser: ArgumentParser) -> None:
    """Defaults only: whatever the user types still wins."""
    defaults: dict[str, Any] = {"make_vocab_size_divisible_by": None}
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        # An extension of Apex.
        defaults["gradient_accumulation_fusion"] = False
    if on_cpu():
        # The softmax kernels are CUDA's; a worker process per rank gains nothing on the two cores of a laptop.
        defaults |= {"masked_softmax_fusion": False, "num_workers": 0, "distributed_backend": "gloo"}
    parser.set_defaults(**defaults)


def on_cpu() -> bool:
    """Whether DeepSpeed's accelerator is the CPU."""
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def _finish_after_parsing(
    parser: ArgumentParser, refused: dict[str, argparse.Action], when_parsed: Callable[[Namespace], None]
) -> None:
    parse = parser.parse_known_args

    def parse_and_finish(args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        parsed, rest = parse(args, namespace)
        _refuse_flags(parsed, refused)
        _finish(parsed)
        when_parsed(parsed)
        return parsed, rest

    parser.parse_known_args = parse_and_finish  # type: ignore[method-assign, assignment]


def _refuse_flags(args: Namespace, refused: dict[str, argparse.Action]) -> None:
    given = [
        action.option_strings[0]
        for dest, action in refused.items()
        if getattr(args, dest, action.default) != action.default
    ]
    if given:
        raise UserError(
            f"{', '.join(given)} is not carried out inside Megatron-DeepSpeed, whose loop and engine are its own; drop "
            "it, or train with megatron-ru pretrain_gpt"
        )


def _finish(args: Namespace) -> None:
    if args.make_vocab_size_divisible_by is None:
        # The host pads the vocabulary to a multiple of this times TP: so the padded size is the same for every TP.
        args.make_vocab_size_divisible_by = 128 // math.gcd(128, args.tensor_model_parallel_size)
    if args.tokenizer_type is None and args.tokenizer_model is not None:
        args.tokenizer_type = _tokenizer_type(Path(args.tokenizer_model))
    if args.num_key_value_heads is None:
        args.num_key_value_heads = args.num_attention_heads
    if args.num_layers is None or args.hidden_size is None or args.num_attention_heads is None:
        raise UserError(
            "missing: --num-layers N, --hidden-size N and --num-attention-heads N; give them, or choose an "
            "architecture with --ru-variant NAME"
        )
    _check_sizes(args)


def _check_sizes(args: Namespace) -> None:
    heads, groups, tp = args.num_attention_heads, args.num_key_value_heads, args.tensor_model_parallel_size
    if groups % tp:
        raise UserError(
            f"--num-key-value-heads {groups} does not divide by tensor parallel size {tp}, and Megatron-DeepSpeed "
            "gives each rank whole key-value heads; change one of them"
        )
    sizes = {"group_query_attention": groups != heads, "num_query_groups": groups}
    check_divisibility(Namespace(**{**vars(args), **sizes}), int(os.environ.get("WORLD_SIZE", "1")))


def _tokenizer_type(path: Path) -> str:
    """The host's name for the kind of tokenizer that the file or folder is."""
    if path.suffix == ".model":
        return "GPTSentencePieceTokenizer"
    if path.is_dir():
        return "HFTokenizer"
    raise UserError(
        f"--tokenizer-model {path} is neither a sentencepiece .model nor the folder of a Hugging Face tokenizer; give "
        "one of these, or say what it is with --tokenizer-type"
    )
