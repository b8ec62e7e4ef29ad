"""Train a small Russian model on this machine, from text to a sampled continuation, in a few minutes.

Dictionary entries from wiki-ru-wordnet become a tokenizer and a dataset; ru_demo is trained on the CPU by four
processes (tensor parallel 2 x pipeline parallel 2, started by mpirun where there is one and by torchrun elsewhere),
stopped on the way and resumed from its checkpoint; then it continues three prompts.

Everything is written to one folder. A second run in it starts anew: it replaces what the first one wrote.
"""

import argparse
from pathlib import Path

NAME = "demo"
SUMMARY = "text to a trained Russian model on this machine, in minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folder and the size."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="DIR", help="the folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="every stage in about a minute; the model learns next to nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo. Returns 0; raises UserError."""
    from megatron_ru.experiments.demo import QUICK, DemoSettings, run_demo

    run_demo(arguments.output, QUICK if arguments.quick else DemoSettings())
    return 0
