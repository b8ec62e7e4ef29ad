"""Our flags in Megatron's parser, and defaults that are true of this machine."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.words import value_of
from megatron_ru.models import variant_arguments
from megatron_ru.seams.cpu_device import CPU_DEVICE

HOST_SPEC = ["megatron_ru.plugin.host_spec", "LAYER_SPEC"]
"""What `--spec` means when the user does not say otherwise."""


def extend_parser(
    parser: argparse.ArgumentParser, when_parsed: Callable[[argparse.Namespace], None] | None = None
) -> argparse.ArgumentParser:
    """Adds our flags and machine defaults to Megatron's parser and returns it.

    A parser that has them already is returned as it is. After the words are parsed the sizes are checked
    (`UserError`), and `when_parsed` is called with the namespace.
    """
    if any(action.dest == "ru_variant" for action in parser._actions):
        return parser
    variant_arguments.extend_parser(parser)
    group = parser.add_argument_group(title="megatron_ru run")
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="Where to train: the GPU when there is one (auto), or the CPU over gloo.",
    )  # fmt: skip
    group.add_argument(
        "--ru-metrics", metavar="FILE", default=None,
        help="Append one JSON line per logged step to FILE (loss, learning rate, gradient norm, seconds), and one per "
        "evaluation.",
    )  # fmt: skip
    group.add_argument(
        "--ru-profile", metavar="FILE", default=None,
        help="Write to FILE, as JSON: times of the steps on the device, forward and backward apart from the rest, peak "
        "memory, and the kernels of a few steps summed up by cause.",
    )  # fmt: skip
    group.add_argument(
        "--ru-profile-steps", metavar="A:B", default=None,
        help="With --ru-profile: the steps of this run whose kernels are recorded, from 1, both included. "
        "Left out, 8:10.",
    )  # fmt: skip
    group.add_argument(
        "--ru-validate-from-start", action="store_true",
        help="Evaluate before the first step too, and on the same validation samples every time.",
    )  # fmt: skip
    group.add_argument(
        "--ru-init", choices=["whole", "megatron"], default="whole",
        help="Draw each weight whole and keep the shard, so that the initial model does not depend on the parallel "
        "layout (whole), or leave the drawing to Megatron.",
    )  # fmt: skip
    group.add_argument(
        "--ru-meta-init", choices=["auto", "on", "off"], default="auto",
        help="Build the model without memory and give each weight its own at once where it is trained, so that the "
        "host never holds the model and a restart draws nothing. auto: where every weight is drawn whole or will be "
        "loaded, and FSDP is not used. The weights are the same as with off.",
    )  # fmt: skip
    group.add_argument(
        "--ru-ops", metavar="LIST", default="all",
        help="Fused ops to use: all, none, or names with commas between them: rms_norm, layer_norm, rope, activation, "
        "cross_entropy, embedding, adamw. What is left out runs as Megatron and torch run it.",
    )  # fmt: skip
    group.add_argument(
        "--ru-attention", choices=["fused", "plain"], default="fused",
        help="fused: attention by the fastest kernel that torch has, without the scores in memory. plain: scores, "
        "softmax and their product with the values one after the other, to compare with.",
    )  # fmt: skip
    group.add_argument(
        "--ru-fp8", choices=["tensorwise"], default=None,
        help="Multiply in fp8 in the linear layers of the transformer blocks, each matrix with one scale of its own, "
        "Hopper and Ada. Weights, the optimizer and everything else stay as they are.",
    )  # fmt: skip
    group.add_argument(
        "--ru-recompute", choices=["off", "auto"], default="off",
        help="What is computed again in backward passes to save memory. auto: before training each pipeline stage "
        "measures a layer, and its layers recompute parts of themselves, or all, in the way that costs the least time "
        "among those that fit into memory. off: what Megatron's --recompute-granularity says.",
    )  # fmt: skip
    group.add_argument(
        "--ru-memory-budget", type=float, metavar="GIB", default=None,
        help="With --ru-recompute auto: GiB that the activations of a rank's layers may take. Left out, what is free "
        "on the GPU; on a CPU it must be given.",
    )  # fmt: skip
    group.add_argument(
        "--ru-exit-signals", action="store_true",
        help="At USR1, USR2 or TERM save a checkpoint at the end of the step and exit with code 75, or with 0 when the "
        "last step was done. Always so under megatron-ru guard.",
    )  # fmt: skip
    group.add_argument(
        "--ru-nan-grads", choices=["zero", "rescale", "skip", "error"], default=None,
        help="What a NaN or an infinity in a gradient costs. zero: that tensor of that rank, which counts as zero in "
        "the mean. rescale: the same, with the mean over the ranks that are left. skip: the step. error: the run, "
        "which says where. Left out, Megatron decides: it stops.",
    )  # fmt: skip
    group.add_argument(
        "--ru-nan-names", action="store_true",
        help="With --ru-nan-grads: print the names of these parameters in each step; the host then waits "
        "for the device.",
    )  # fmt: skip
    group.add_argument(
        "--ru-checkpoints", choices=["safe", "megatron"], default=None,
        help="Who saves and loads. safe: a save has its name when every file of it is on disk and summed, a full disk "
        "does not end the run, and the newest whole checkpoint is loaded. megatron: Megatron by itself. Left out, "
        "megatron-ru pretrain_gpt is safe, and Megatron-LM's own script is not.",
    )  # fmt: skip
    group.add_argument(
        "--ru-keep", type=int, metavar="N", default=None,
        help="With --ru-checkpoints safe: after each save remove all checkpoints but the newest N. Left out, all stay.",
    )  # fmt: skip
    group.add_argument(
        "--ru-keep-every", type=int, metavar="M", default=None,
        help="With --ru-keep: keep every checkpoint whose step is a multiple of M, too.",
    )  # fmt: skip
    group.add_argument(
        "--ru-data", metavar="CONFIG", default=None,
        help="Before training, run the pipeline of this file on the first rank of each node, as far as it is not done "
        "already, and train on what it made. With RUADAPT_NO_TRAIN=1 in the environment that is all.",
    )  # fmt: skip
    group.add_argument(
        "--ru-packed", action=argparse.BooleanOptionalAction, default=None,
        help="Read the documents of the datasets as blocks: each sample is one block, its padding and its last "
        "position have no loss. Left out, that is so where PREFIX.packed.json says that a dataset is packed.",
    )  # fmt: skip
    _mend_help(parser)
    _set_machine_defaults(parser)
    _finish_after_parsing(parser, when_parsed)
    return parser


def device_of(words: list[str]) -> str:
    """`cpu` or `cuda`: what `--device` in the words, or else the machine, says. Imports torch only if it must."""
    wanted = value_of(words, "--device")
    if wanted == "cpu":
        return "cpu"
    import torch

    has_gpu = torch.cuda.is_available() and not CPU_DEVICE.installed
    if wanted == "cuda" and not has_gpu:
        raise UserError("--device cuda was given, but torch sees no CUDA device; check nvidia-smi, or use --device cpu")
    return "cuda" if has_gpu else "cpu"


class _ByDefault(int):
    """A number that nobody typed."""


def _set_machine_defaults(parser: argparse.ArgumentParser) -> None:
    """Defaults only: whatever the user types still wins."""
    defaults: dict[str, Any] = {
        "spec": HOST_SPEC,
        "transformer_impl": "local",
        # Kernels of Apex and TransformerEngine that our modules do not call.
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": _ByDefault(1),
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        # Attention is causal without a [sequence, sequence] mask in every batch.
        "create_attention_mask_in_dataloader": "--reset-attention-mask" in sys.argv,
        "make_vocab_size_divisible_by": _ByDefault(128),
        # The other modes ask all ranks in each step whether to repeat it. A NaN in the loss ends the run here too.
        "rerun_mode": "disabled",
        # Megatron's default is None, with which its sample counts fail.
        "eval_interval": 1000,
    }
    if _typed_value(parser, "transformer_impl") == "transformer_engine":
        defaults = {}
    if CPU_DEVICE.installed:
        # A worker process per rank gains nothing on the two cores of a laptop.
        defaults |= {"distributed_backend": "gloo", "num_workers": 0}
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Escapes the per cent signs of help texts that argparse cannot format: with one of them, as in megatron-core
    0.19, `--help` is a traceback."""
    for action in parser._actions:
        try:
            str(action.help) % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def _typed_value(parser: argparse.ArgumentParser, dest: str) -> str | None:
    """The value that follows one of a flag's spellings on the command line, or None."""
    spellings = [s for action in parser._actions if action.dest == dest for s in action.option_strings]
    for index, word in enumerate(sys.argv):
        flag, equals, value = word.partition("=")
        if flag in spellings:
            return value if equals else (sys.argv[index + 1] if index + 1 < len(sys.argv) else None)
    return None


def _finish_after_parsing(
    parser: argparse.ArgumentParser, when_parsed: Callable[[argparse.Namespace], None] | None
) -> None:
    parse = parser.parse_known_args

    def parse_and_finish(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = parse(args, namespace)
        _finish(parsed)
        if when_parsed is not None:
            when_parsed(parsed)
        return parsed, rest

    parser.parse_known_args = parse_and_finish  # type: ignore[method-assign]


def _finish(args: argparse.Namespace) -> None:
    if isinstance(args.make_vocab_size_divisible_by, _ByDefault):
        # Megatron pads the vocabulary to a multiple of this times TP. Keeping the product at 128 for every TP keeps
        # the padded vocabulary, and with it the loss and the checkpoints, the same in every layout.
        size = args.tensor_model_parallel_size
        args.make_vocab_size_divisible_by = 128 // math.gcd(128, size)
    if isinstance(args.gradient_accumulation_fusion, _ByDefault):
        # These keep gradients elsewhere than in Megatron's buffer.
        others = ("use_torch_fsdp2", "use_megatron_fsdp")
        other_engine = getattr(args, "engine", "megatron") not in (None, "megatron")
        args.gradient_accumulation_fusion = not (other_engine or any(getattr(args, name, False) for name in others))
    if CPU_DEVICE.installed and args.distributed_backend == "nccl":
        raise UserError("--distributed-backend nccl needs GPUs, but this run is on the CPU; drop the flag, or use gloo")
    if args.tokenizer_type is None:
        args.tokenizer_type = _tokenizer_type(args)
    # A job of one process may come without a launcher.
    variant_arguments.check_divisibility(args, int(os.environ.get("WORLD_SIZE", "1")))


def _tokenizer_type(args: argparse.Namespace) -> str | None:
    """Megatron's name for the kind of tokenizer that `--tokenizer-model` is."""
    if args.tokenizer_model is None:
        return "NullTokenizer" if args.mock_data else None
    path = Path(args.tokenizer_model)
    if path.suffix == ".model":
        return "SentencePieceTokenizer"
    if path.suffix == ".json" or path.is_dir():
        return "HuggingFaceTokenizer"
    raise UserError(
        f"--tokenizer-model {path} is neither a sentencepiece .model, a tokenizer.json nor a folder that holds one; "
        "give one of these, or say what it is with --tokenizer-type"
    )
