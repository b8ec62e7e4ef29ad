"""An unmodified Megatron-DeepSpeed script with our flags, variants, ranks, fused ops and repairs.

    megatron-ru run_host PATH/pretrain_gpt.py --deepspeed --deepspeed_config FILE ARGS

As in `megatron_lm`, nothing of the host is touched until the script has imported its argument parser. On a machine
without a GPU, DeepSpeed's own CPU accelerator carries the run over gloo: our CPU layer is not needed.
"""

import os
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require
from megatron_ru.plugin.exit_signals import FLAG
from megatron_ru.plugin.rank_errors import end_on_failure, meet_ranks, refused_by_megatron
from megatron_ru.plugin.rank_start import start_rank
from megatron_ru.seams.when_imported import when_imported

_entered = False


def run_host(script: str, words: list[str]) -> None:
    """Runs the script as `python SCRIPT WORDS` would, with us inside; raises `UserError` for what cannot work."""
    path = Path(script)
    if not path.is_file():
        raise UserError(f"{script} is not a file, expected the pretrain_gpt.py of a Megatron-DeepSpeed checkout")
    start_rank(listen=FLAG in words)
    sys.argv = [str(path), *words]
    # As `python SCRIPT` does, and before anything imports megatron: the checkout's package must be the one found.
    sys.path[0] = str(path.resolve().parent)
    enter(words)
    runpy.run_path(str(path), run_name="__main__")
    from megatron_ru.plugin.ranks_together import leave_ranks

    leave_ranks()


def enter(words: list[str]) -> None:
    """Maps the ranks, chooses DeepSpeed's accelerator and waits for the host's parser; once per process."""
    global _entered
    if _entered:
        return
    _entered = True
    end_on_failure()
    if "RANK" in os.environ and "LOCAL_SIZE" in os.environ:
        # DeepSpeed's own launcher counts the ranks of this host under this name.
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    meet_ranks()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _choose_accelerator(words)
    # Not imported yet where it is there: torch may still be on its way in.
    for module, extra in (("deepspeed", "deepspeed"), ("transformers", "hf")):
        if find_spec(module) is None:
            require(module, "Megatron-DeepSpeed", extra)
    from megatron_ru.hosts.megatron_deepspeed_stand_ins import stand_in_for_missing_modules

    stand_in_for_missing_modules()
    when_imported("megatron.initialize", _extend_arguments)


def _choose_accelerator(words: list[str]) -> None:
    """Tells DeepSpeed its accelerator, which it chooses when it is imported. Raises `UserError` for a GPU without
    Apex."""
    from megatron_ru.plugin.arguments import device_of

    if os.environ.get("DS_ACCELERATOR") == "cpu" and not any(word.startswith("--device") for word in words):
        words = ["--device", "cpu"]
    if device_of(words) == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # The CPU accelerator counts its devices by this variable, and the host takes rank modulo that for the device.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    elif find_spec("apex") is None or find_spec("apex.normalization") is None:
        raise UserError(
            "Megatron-DeepSpeed imports NVIDIA's Apex on a GPU, and it is not installed (the package of that name on "
            "PyPI is another one); build it from github.com/NVIDIA/apex, or train on the CPU with --device cpu"
        )


def _extend_arguments(initialize: ModuleType) -> None:
    from megatron_ru.hosts.megatron_deepspeed_arguments import extend_parser
    from megatron_ru.seams.seam import Seam

    def parse(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
        def parse_args(
            extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None, *rest: Any, **keywords: Any
        ) -> Namespace:
            def provide(parser: ArgumentParser) -> ArgumentParser:
                parser = extra_args_provider(parser) if extra_args_provider is not None else parser
                return extend_parser(parser, _when_parsed)

            return original(provide, *rest, **keywords)

        return parse_args

    def validate(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate_args(args: Namespace, *rest: Any, **keywords: Any) -> Any:
            try:
                return original(args, *rest, **keywords)
            except AssertionError as error:
                raise refused_by_megatron(error) from error

        return validate_args

    name = initialize.__name__
    Seam(
        target=f"{name}:parse_args",
        make=parse,
        expects=("extra_args_provider",),
        reason="the extra arguments of a script are hard-wired in the script",
    ).install()
    Seam(
        target=f"{name}:validate_args",
        make=validate,
        expects=("args",),
        reason="a wrong argument is an assertion there, often without a word",
    ).install()


def _when_parsed(args: Namespace) -> None:
    from megatron_ru.hosts.megatron_deepspeed_checks import check_data_of, check_supported
    from megatron_ru.hosts.megatron_deepspeed_run import install_run

    start_rank(listen=args.ru_exit_signals)
    check_supported(args)
    check_data_of(args)
    install_run(args)
