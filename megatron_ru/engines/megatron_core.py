"""`pretrain_gpt` on the Megatron-Core wheel: Megatron's own arguments and loop, our model and data path."""

import os
import sys
import time
import traceback
import warnings
from typing import Any

from megatron_ru.foundation.errors import TRY_AGAIN
from megatron_ru.plugin.early_start import begin_early
from megatron_ru.plugin.exit_signals import FLAG
from megatron_ru.plugin.light_imports import light_imports
from megatron_ru.plugin.rank_errors import exit_code_of, meet_ranks, refused_by_megatron
from megatron_ru.plugin.rank_start import start_rank


def pretrain_gpt(words: list[str]) -> None:
    """Trains as Megatron-LM's `pretrain_gpt.py WORDS` would.

    Raises `UserError` for input that cannot be trained on, before anything is written.
    """
    start_rank(listen=FLAG in words)
    ranks = meet_ranks()
    if (prepared := _prepared(words, ranks.local_rank)) is None:
        return
    words = prepared
    begin_early(words, rank=ranks.rank, ranks=ranks.world_size, safe=True)
    _share_cores(ranks.local_world_size)
    from megatron_ru.plugin.arguments import device_of, extend_parser

    if device_of(words) == "cpu":
        from megatron_ru.seams.cpu_device import CPU_DEVICE

        CPU_DEVICE.install()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    sys.argv = ["megatron-ru pretrain_gpt", *words]

    # Both are optional here, so their absence is no news.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed")
    import psutil

    with light_imports(words):
        from megatron.core.enums import ModelType
        from megatron.training import pretrain, set_startup_timestamps
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

    from megatron_ru.engines.choice import engine_seams, weights_taken
    from megatron_ru.engines.deepspeed.flags import add_engine_flags
    from megatron_ru.engines.gpt_batches import datasets_provider, forward_step
    from megatron_ru.plugin.checks import check_checkpoint_format, check_complete, check_data, check_supported
    from megatron_ru.plugin.ranks_together import leave_ranks
    from megatron_ru.plugin.run import install_run

    set_startup_timestamps(program_start=psutil.Process().create_time(), main_entry=time.time())

    def when_parsed(args: Any) -> None:
        check_complete(args)
        check_supported(args)
        check_checkpoint_format(args)
        check_data(args)
        args.ru_checkpoints = args.ru_checkpoints or "safe"
        install_run(args, engine_seams(args), weights_taken(args))

    try:
        args = parse_and_validate_args(
            extra_args_provider=lambda parser: add_engine_flags(extend_parser(parser, when_parsed))
        )
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    except AssertionError as error:
        raise refused_by_megatron(error) from error
    # Each rank builds its own part of the datasets.
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    try:
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except AssertionError as error:
        # While the model is set up Megatron asserts that the checkpoint fits the arguments; later it asserts itself.
        if any(frame.name == "setup_model_and_optimizer" for frame in traceback.extract_tb(error.__traceback__)):
            raise refused_by_megatron(error) from error
        raise
    except SystemExit as leaving:
        # All ranks leave here together, before the last step: at a signal or at an interval.
        if leaving.code in (None, 0, TRY_AGAIN):
            leave_ranks()
        raise
    leave_ranks()


def main(words: list[str] | None = None) -> int:
    """Runs `pretrain_gpt` and returns its exit code: 0 trained, 2 bad input."""
    return exit_code_of(lambda: pretrain_gpt(sys.argv[1:] if words is None else words), "megatron-ru pretrain_gpt")


def _prepared(words: list[str], local_rank: int) -> list[str] | None:
    """The words with the data of `--ru-data`; None when preparing it was all."""
    if not any(word.partition("=")[0] == "--ru-data" for word in words) and "RUADAPT_NO_TRAIN" not in os.environ:
        return words
    from megatron_ru.data.before_training import prepare_data

    return prepare_data(words, local_rank)


def _share_cores(ranks: int) -> None:
    """One share of the cores for each rank of this host, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        threads = max(1, (os.cpu_count() or 1) // ranks)
        # Torch is loaded and has read the variable; it is for the processes that this one starts.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
