"""`--ru-checkpoints safe`: whole checkpoints, for our entry and for an unmodified Megatron-LM."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.early_start import threads_of_a_rank
from megatron_ru.seams.seam import Seam


def safe_checkpoint_seams(args: argparse.Namespace, report: Callable[[dict[str, Any]], None]) -> list[Seam]:
    """The seams of one run, none where Megatron saves and loads by itself.

    `report` gets the lines that belong into the metrics file. Raises `UserError` for a number of checkpoints to keep
    that cannot be kept.
    """
    if args.ru_checkpoints != "safe":
        if args.ru_keep is not None or args.ru_keep_every is not None:
            raise UserError("--ru-keep and --ru-keep-every need --ru-checkpoints safe; add it, or drop them")
        return []
    _check_retention(args)
    threads = threads_of_a_rank()
    seams = []
    if args.load or getattr(args, "pretrained_checkpoint", None):
        from megatron_ru.plugin.safe_loading import SafeLoading

        seams += SafeLoading(args, threads).seams()
    if args.save and "://" not in args.save:
        from megatron_ru.plugin.safe_saving import SafeSaving

        seams += SafeSaving(args, threads, report).seams()
    return seams


def _check_retention(args: argparse.Namespace) -> None:
    for flag, value in (("--ru-keep", args.ru_keep), ("--ru-keep-every", args.ru_keep_every)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} was given, expected 1 or more; drop it to keep every checkpoint")
    if args.ru_keep is None and args.ru_keep_every is not None:
        raise UserError("--ru-keep-every says what --ru-keep spares; add --ru-keep N")
    interval = getattr(args, "save_retain_interval", None)
    if interval is not None:
        if args.ru_keep is not None:
            raise UserError("--save-retain-interval and --ru-keep both say what to keep; drop one of them")
        # The same by our hands: Megatron deletes what its own tracker named before.
        args.ru_keep, args.ru_keep_every, args.save_retain_interval = 1, interval, None
