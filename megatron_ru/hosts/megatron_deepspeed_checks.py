"""What can be known to fail, or to train something else, inside Megatron-DeepSpeed."""

from argparse import Namespace
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts.megatron_deepspeed_arguments import on_cpu
from megatron_ru.plugin.checks import data_prefixes
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokens.indexed_dataset import check_dataset


def check_supported(args: Namespace) -> None:
    """Raises `UserError` for what this host cannot do, or does wrongly without a word."""
    if not getattr(args, "deepspeed", False) or not getattr(args, "deepspeed_config", None):
        raise UserError(
            "Megatron-DeepSpeed trains with its DeepSpeed engine only; add --deepspeed --deepspeed_config FILE"
        )
    if not isinstance(args.deepspeed_config, dict) and not Path(args.deepspeed_config).is_file():
        raise UserError(f"--deepspeed_config {args.deepspeed_config} is not a file, expected DeepSpeed's JSON settings")
    if args.num_layers_per_virtual_pipeline_stage is not None:
        raise UserError(
            "--num-layers-per-virtual-pipeline-stage was given, but DeepSpeed's pipeline has no virtual stages and "
            "would train the first of them alone; drop it"
        )
    if args.ds_sequence_parallel_size > 1 or args.force_ds_sequence_parallel or fpdt(args):
        raise UserError(
            "DeepSpeed's sequence parallelism (--ds-sequence-parallel-size, --force-ds-sequence-parallel, "
            "--ds-sequence-parallel-fpdt) is not tried with us inside, and our rotary positions would count from the "
            "start of each rank's part; use --sequence-parallel, or run the script without megatron-ru"
        )
    _check_sequence_parallel(args)
    if on_cpu():
        _check_cpu(args)


def check_data_of(args: Namespace) -> None:
    """Raises `UserError` for a tokenizer that cannot be read, and for datasets that are missing, truncated, or made
    with a larger vocabulary than the tokenizer's."""
    for prefix in data_prefixes(args):
        check_dataset(prefix, _vocab_size_of(args), sample=True)


def fpdt(args: Namespace) -> bool:
    """Whether the chunked attention of the latest checkouts was asked for."""
    return bool(getattr(args, "ds_sequence_parallel_fpdt", False))


def _check_sequence_parallel(args: Namespace) -> None:
    if not args.sequence_parallel or args.tensor_model_parallel_size == 1:
        return
    if args.no_pipeline_parallel:
        raise UserError(
            "--sequence-parallel with --no-pipeline-parallel crashes in Megatron-DeepSpeed, whose script and whose "
            "embedding both cut the sequence; drop --no-pipeline-parallel (a pipeline of one stage will do)"
        )
    if args.ru_host_repairs == "none":
        raise UserError(
            "--sequence-parallel trains wrongly in Megatron-DeepSpeed as it is: the gradients of the norms are not "
            "summed over the tensor-parallel ranks; drop it, or --ru-host-repairs none"
        )


def _check_cpu(args: Namespace) -> None:
    if args.fp16:
        raise UserError("--fp16 was given, and DeepSpeed's CPU accelerator has no fp16; use --bf16 or fp32")
    flash = [
        f"--{name.replace('_', '-')}"
        for name in ("use_flash_attn_v1", "use_flash_attn_v2", "use_flash_attn_triton", "use_flash_attn_builder")
        if getattr(args, name, False)
    ]
    if flash:
        raise UserError(f"{', '.join(flash)} needs a GPU, but this run is on the CPU; drop it")


def _vocab_size_of(args: Namespace) -> int | None:
    """The number of token ids of the tokenizer that the arguments name, None when only the host can tell."""
    if args.tokenizer_type == "NullTokenizer":
        return None if args.vocab_size is None else int(args.vocab_size) + 1
    files = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer", "HFTokenizer")
    if args.tokenizer_type not in files or args.tokenizer_model is None:
        return None
    if args.tokenizer_type == "HFTokenizer" and not Path(args.tokenizer_model).exists():
        return None
    return load_tokenizer(args.tokenizer_model).vocab_size
