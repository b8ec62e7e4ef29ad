"""Train every architecture of the published comparisons at toy size, and print their losses beside the published ones.

    megatron-ru ladder                          the seven steps, and positions at every layer
    megatron-ru ladder --table activations      six activations with and without biases
    megatron-ru ladder --table mlp-ratio        seven ratios C of feed-forward width to hidden size
    megatron-ru ladder --table all --data ru.jsonl.gz --steps 400

Every variant has its own architecture (positions, norm, its place, activation, biases, C, query groups, dropout); size,
seed, data and their order are the same for all. Each is trained in one process on the CPU, two or more at a time.
Called again in the same folder, it trains what is missing.
"""

import argparse
import os
from pathlib import Path

NAME = "ladder"
SUMMARY = "train the ladder of architectures at toy size and compare it with the published one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to train, on what, and how long."""
    parser.add_argument(
        "--table", choices=["ladder", "activations", "mlp-ratio", "all"], default="ladder",
        help="what to train (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps of each (default: %(default)s)")
    parser.add_argument(
        "--data", metavar="PREFIX|FILE",
        help="a dataset PREFIX.bin and .idx, or JSON Lines (default: Russian dictionary entries of wiki-ru-wordnet)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-model", metavar="FILE", help="tokenizer of the data (default: BPE trained on the text)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/ladder"), metavar="DIR",
        help="the folder to write to (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2,
        metavar="N", help="variants trained at the same time (default: one for each processor)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Runs the comparison. Returns 0; raises UserError."""
    from megatron_ru.experiments.ladder import LadderSettings, run_ladder
    from megatron_ru.experiments.published import TABLES

    tables = list(TABLES) if arguments.table == "all" else [arguments.table]
    settings = LadderSettings(steps=arguments.steps, seed=arguments.seed)
    run_ladder(arguments.output, tables, settings, arguments.data, arguments.tokenizer_model, arguments.jobs)
    return 0
