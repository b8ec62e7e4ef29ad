"""What can be known to fail before the first process group is made."""

from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.cpu_device import CPU_DEVICE


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


def check_host(args: Any) -> None:
    """Raises `UserError` for what the Megatron-LM around us cannot do with us inside."""
    from megatron.core.package_info import __version__
    from packaging.version import Version

    version = Version(Version(__version__).base_version)
    if not Version("0.16") <= version < Version("0.21"):
        raise UserError(
            f"this Megatron-LM carries megatron-core {__version__}, expected 0.16 to 0.20; check out one of those"
        )
    virtual = args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    if CPU_DEVICE.installed and virtual and version < Version("0.17"):
        raise UserError(
            f"virtual pipeline stages on the CPU give different losses from run to run with megatron-core {__version__}; "
            "drop --num-layers-per-virtual-pipeline-stage, or check out core 0.17 or later"
        )


def check_data(args: Any) -> None:
    """Raises `UserError` for datasets that are missing, truncated, or made with a larger vocabulary."""
    from megatron_ru.tokens.indexed_dataset import check_dataset

    for prefix in data_prefixes(args):
        check_dataset(prefix, vocab_size=None)


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
