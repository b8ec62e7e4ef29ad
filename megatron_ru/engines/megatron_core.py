"""`pretrain_gpt` on the Megatron-Core wheel: Megatron's own arguments and loop, our model and data path."""

import time

_PROGRAM_START = time.time()  # before the slow imports, for Megatron's start-up report

import os
import sys
from typing import Any

from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous
from megatron_ru.foundation.ranks import apply_rank_environment
from megatron_ru.plugin.arguments import device_of
from megatron_ru.plugin.rank_errors import exit_code_of


def pretrain_gpt(words: list[str]) -> None:
    """Trains as Megatron-LM's `pretrain_gpt.py WORDS` would.

    Raises `UserError` for input that cannot be trained on, before anything is written.
    """
    ensure_rendezvous(os.environ)
    apply_rank_environment(os.environ)
    _set_torch_threads()
    if device_of(words) == "cpu":
        from megatron_ru.seams.cpu_device import CPU_DEVICE

        CPU_DEVICE.install()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    sys.argv = ["megatron-ru pretrain_gpt", *words]

    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_ru.engines.gpt_batches import datasets_provider, forward_step
    from megatron_ru.plugin.arguments import extend_parser
    from megatron_ru.plugin.checks import check_data, check_supported
    from megatron_ru.plugin.run import install_run

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())

    def when_parsed(args: Any) -> None:
        check_supported(args)
        check_data(args)
        install_run(args)

    args = parse_and_validate_args(extra_args_provider=lambda parser: extend_parser(parser, when_parsed))
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    # Each rank builds its own part of the datasets.
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    try:
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    finally:
        _leave_process_group()


def main(words: list[str] | None = None) -> int:
    """Runs `pretrain_gpt` and returns the exit code; a `UserError` is one sentence from the first rank of a host."""
    return exit_code_of(lambda: pretrain_gpt(sys.argv[1:] if words is None else words), "megatron-ru pretrain_gpt")


def _set_torch_threads() -> None:
    """One share of the cores per rank of this host, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))


def _leave_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized() and sys.exc_info()[0] is None:
        torch.distributed.destroy_process_group()
