"""The flags of `megatron-ru pretrain_gpt` that choose an engine."""

import argparse


def add_engine_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--engine` and what belongs to it to a parser of training, and returns it.

    Scripts of others never get them: Megatron-DeepSpeed has flags of these names.
    """
    group = parser.add_argument_group(title="megatron_ru engine")
    group.add_argument(
        "--engine", choices=["megatron", "deepspeed"], default="megatron",
        help="Who holds gradients and optimizer: Megatron-Core, or DeepSpeed's ZeRO.",
    )  # fmt: skip
    group.add_argument(
        "--deepspeed_config", metavar="FILE", default=None,
        help="With --engine deepspeed: DeepSpeed's own JSON. What Megatron's arguments say too (batch sizes, "
        "precision, clipping, Adam) may be left out or be 'auto'; where the two differ the run is refused.",
    )  # fmt: skip
    group.add_argument(
        "--zero-stage", type=int, choices=[0, 1, 2, 3], default=None,
        help="With --engine deepspeed: what ZeRO shards over the data-parallel ranks. 0: nothing. 1: the optimizer. "
        "2: gradients too. 3: weights too. Left out, the JSON says it, or it is 1.",
    )  # fmt: skip
    group.add_argument(
        "--zero-offload", choices=["none", "cpu"], default=None,
        help="With --engine deepspeed: where the optimizer's state lives and steps. Left out, the JSON says it, or it "
        "is the device.",
    )  # fmt: skip
    return parser
