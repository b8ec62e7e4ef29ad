"""An unmodified Megatron-LM script with our flags, variants, ranks and CPU layer.

Two ways lead here: `megatron-ru run_host PATH/pretrain_gpt.py ARGS`, and the entry point that torch calls at import
(`megatron_ru.autoload`). Both end in `enter`, which touches nothing of Megatron: it waits until the script imports
Megatron's argument parser, adds our flags to it, and installs the run's seams when the words are parsed.
"""

import os
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.early_start import begin_early
from megatron_ru.plugin.exit_signals import FLAG
from megatron_ru.plugin.rank_errors import end_on_failure, meet_ranks
from megatron_ru.plugin.rank_start import start_rank
from megatron_ru.seams.when_imported import when_imported

_entered = False


def run_host(script: str, words: list[str]) -> None:
    """Runs a Megatron-LM script as `python SCRIPT WORDS` would, with us inside.

    Raises `UserError` when there is no such script, or when nothing around it is Megatron.
    """
    path = Path(script)
    if not path.is_file():
        raise UserError(f"{script} is not a file, expected the pretrain_gpt.py of a Megatron-LM checkout")
    folder = path.resolve().parent
    if not (folder / "megatron" / "core").is_dir():
        raise UserError(
            f"{folder} has no folder megatron/core, expected a Megatron-LM checkout (core 0.16 to 0.20) around {script}"
        )
    start_rank(listen=FLAG in words)
    sys.argv = [str(path), *words]
    # As `python SCRIPT` does, and before anything imports megatron: the checkout's package must be the one found.
    sys.path[0] = str(folder)
    enter(words)
    runpy.run_path(str(path), run_name="__main__")


def enter(words: list[str]) -> None:
    """Maps the ranks, chooses the device and waits for Megatron's parser; once per process."""
    global _entered
    if _entered:
        return
    _entered = True
    end_on_failure()
    ranks = meet_ranks()
    begin_early(words, rank=ranks.rank, ranks=ranks.world_size, safe=False)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron_ru.plugin.arguments import device_of

    if device_of(words) == "cpu":
        from megatron_ru.seams.cpu_device import CPU_DEVICE

        CPU_DEVICE.install()
    when_imported("megatron.training.arguments", _extend_arguments)


def _extend_arguments(arguments: ModuleType) -> None:
    from megatron_ru.plugin.arguments import extend_parser
    from megatron_ru.seams.seam import Seam

    def make(original: Callable[..., ArgumentParser]) -> Callable[..., ArgumentParser]:
        return lambda parser, *rest, **keywords: extend_parser(original(parser, *rest, **keywords), _when_parsed)

    Seam(
        target=f"{arguments.__name__}:add_megatron_arguments",
        make=make,
        expects=("parser",),
        reason="the extra arguments of a script are hard-wired in the script",
    ).install()


def _when_parsed(args: Namespace) -> None:
    from megatron_ru.plugin.checks import check_checkpoint_format, check_data, check_host
    from megatron_ru.plugin.run import install_run

    # Only now: whatever imports torch comes through `enter`, but who has Megatron's arguments trains.
    start_rank(listen=args.ru_exit_signals)
    check_host(args)
    check_checkpoint_format(args)
    check_data(args)
    install_run(args)
