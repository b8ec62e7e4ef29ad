"""Which engine holds gradients and optimizer in Megatron's loop."""

from argparse import Namespace

from megatron_ru.engines.deepspeed.support import check_engine
from megatron_ru.seams.seam import Seam


def engine_seams(args: Namespace) -> list[Seam]:
    """The seams of the engine that `--engine` names, none for Megatron's own. Raises `UserError` where the arguments
    ask for what it does not carry out."""
    check_engine(args)
    if args.engine == "megatron":
        return []
    from megatron_ru.engines.deepspeed.seams import deepspeed_seams

    return deepspeed_seams(args)
