"""What can be known to fail before the first process group is made."""

from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.seams.cpu_device import CPU_DEVICE
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokens.indexed_dataset import check_dataset

_FP8_CAPABILITY = (8, 9)
_FILE_TOKENIZERS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def check_supported(args: Any) -> None:
    """Raises `UserError` for flags that our own entry does not carry out."""
    unsupported = {
        "--context-parallel-size": getattr(args, "context_parallel_size", 1) > 1,
        "--sft": getattr(args, "sft", False),
        "--fim-data": getattr(args, "fim_data", False),
        "--dataloader-inter-document-masking": getattr(args, "dataloader_inter_document_masking", False),
        "--hybrid-context-parallel": getattr(args, "hybrid_context_parallel", False),
        "--logits-load-dir": getattr(args, "logits_load_dir", None) is not None,
        "--overlap-moe-expert-parallel-comm": getattr(args, "overlap_moe_expert_parallel_comm", False),
    }
    found = [flag for flag, used in unsupported.items() if used]
    if found:
        raise UserError(
            f"{', '.join(found)} was given, which megatron-ru pretrain_gpt does not carry out; drop it, or run "
            "Megatron-LM's own script with megatron-ru run_host PATH/pretrain_gpt.py"
        )


def check_fp8(args: Any) -> None:
    """Raises `UserError` for `--ru-fp8` on a GPU that cannot multiply fp8 numbers, and with another layer spec."""
    if args.ru_fp8 is None:
        return
    if args.spec != HOST_SPEC:
        raise UserError("--ru-fp8 was given, but --spec names layers that are not ours; leave one of the two out")
    if CPU_DEVICE.installed:
        # Plain torch computes the same there, to try it.
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < _FP8_CAPABILITY:
        raise UserError(
            f"--ru-fp8 {args.ru_fp8} was given, but {torch.cuda.get_device_name()} has no fp8 products (compute "
            f"capability {major}.{minor}, expected 8.9 or higher: Ada, Hopper); leave it out"
        )


def check_complete(args: Any) -> None:
    """Raises `UserError` when something is missing without which nothing can be trained."""
    has_data = bool(data_prefixes(args)) or args.data_args_path or args.per_split_data_args_path
    missing = {
        "--micro-batch-size N": args.micro_batch_size is None,
        "--train-iters N (or --train-samples N)": not (args.train_iters or args.train_samples or args.skip_train),
        "--lr X": args.lr is None and not args.skip_train,
        "--save-interval N (beside --save)": bool(args.save) and not args.save_interval,
        "--data-path PREFIX (or --mock-data)": not (has_data or args.mock_data),
        "--tokenizer-model FILE": args.tokenizer_type is None and args.tokenizer_model is None,
        "--num-layers N, --hidden-size N and --num-attention-heads N (or --ru-variant NAME)": not (
            args.num_layers and args.hidden_size and args.num_attention_heads
        ),
    }
    flags = [flag for flag, absent in missing.items() if absent]
    if flags:
        raise UserError(f"missing: {'; '.join(flags)}; megatron-ru pretrain_gpt --help lists every flag")


def check_host(args: Any) -> None:
    """Raises `UserError` for what the Megatron-LM around us cannot do with us inside."""
    from megatron.core.package_info import __version__
    from packaging.version import Version

    version = Version(Version(__version__).base_version)
    if not Version("0.16") <= version < Version("0.21"):
        raise UserError(
            f"this Megatron-LM carries megatron-core {version}, expected 0.16 to 0.20; check out one of those"
        )
    virtual = args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    if CPU_DEVICE.installed and virtual and version < Version("0.17"):
        raise UserError(
            f"virtual pipeline stages on the CPU give losses that vary from run to run with megatron-core "
            f"{version}; drop --num-layers-per-virtual-pipeline-stage, or check out core 0.17 or later"
        )


def check_checkpoint_format(args: Any) -> None:
    """Raises `UserError` for checkpoints that megatron-core could write here and never read again."""
    if args.ckpt_format != "torch" or not args.use_distributed_optimizer or not (args.save or args.load):
        return
    from megatron.core.optimizer import distrib_optimizer

    if not getattr(distrib_optimizer, "HAVE_APEX_OR_TE", True):
        raise UserError(
            "--ckpt-format torch with --use-distributed-optimizer cannot be loaded again without Apex or "
            "TransformerEngine; use --ckpt-format torch_dist, or drop --use-distributed-optimizer"
        )


def check_data(args: Any) -> None:
    """Raises `UserError` for a tokenizer that cannot be read, and for datasets that are missing, truncated, or made
    with a larger vocabulary than the tokenizer's."""
    vocab_size = vocab_size_of(args)
    for prefix in data_prefixes(args):
        check_dataset(prefix, vocab_size, sample=True)


def vocab_size_of(args: Any) -> int | None:
    """The number of token ids of the tokenizer that the arguments name, None when only Megatron can tell."""
    if args.tokenizer_type in ("NullTokenizer", "NullMultimodalTokenizer"):
        # Megatron's null tokenizer adds an end-of-document id behind the others.
        return None if args.vocab_size is None else int(args.vocab_size) + 1
    is_file = args.tokenizer_type in _FILE_TOKENIZERS
    if args.tokenizer_model is None:
        if is_file:
            raise UserError(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model FILE")
        return None
    if is_file or (args.tokenizer_type == "HuggingFaceTokenizer" and Path(args.tokenizer_model).exists()):
        return load_tokenizer(args.tokenizer_model).vocab_size
    return None


def data_prefixes(args: Any) -> list[str]:
    """The dataset prefixes that the arguments name, without their weights."""
    words: list[str] = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words += getattr(args, name, None) or []
    return [word for word in words if not _is_number(word)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
