"""Which engine holds gradients and optimizer in Megatron's loop."""

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_ru.engines.deepspeed.support import check_engine
from megatron_ru.seams.seam import Seam

if TYPE_CHECKING:
    from megatron_ru.plugin.model_building import HandOver


def engine_seams(args: Namespace) -> list[Seam]:
    """The seams of the engine that `--engine` names, none for Megatron's own. Raises `UserError` where the arguments
    ask for what it does not carry out."""
    check_engine(args)
    if args.engine == "megatron":
        return []
    from megatron_ru.engines.deepspeed.seams import deepspeed_seams

    return deepspeed_seams(args)


def weights_taken(args: Namespace) -> "HandOver | None":
    """What takes weights from the model while it is built, for an engine that keeps a share of each; else None.

    Asked after `engine_seams`, which checks what it reads.
    """
    if args.engine == "megatron":
        return None
    from megatron_ru.engines.deepspeed.config import read_config, stage_of

    given = read_config(args.deepspeed_config)
    if stage_of(args, given) != 3:
        return None
    from megatron_ru.engines.deepspeed.sharding_early import EarlySharding

    return EarlySharding(given)
