"""Turn text into the datasets that Megatron trains on, and check them.

megatron-ru data demo --output ru.jsonl.gz
megatron-ru data tokenize --input ru.jsonl.gz --tokenizer ru.model --output data/ru --workers 8
megatron-ru data check data/ru --vocab-size 32000
"""

import argparse
import os
import sys
from typing import Any

NAME = "data"
SUMMARY = "tokenise JSON Lines into Megatron's .bin/.idx, check a dataset, write the demo's text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions `tokenize`, `check` and `demo`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    tokenize = actions.add_parser("tokenize", help="JSON Lines to .bin and .idx", description=_tokenize.__doc__)
    tokenize.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines or parquet: .jsonl, .jsonl.gz, .jsonl.zst, .parquet",
    )
    tokenize.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="sentencepiece .model or Hugging Face tokenizer.json",
    )
    tokenize.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    tokenize.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field that holds the text (default: %(default)s)",
    )
    tokenize.add_argument(
        "--workers", type=int, default=_usable_processors(), metavar="N",
        help="processes that encode; the output does not depend on it (default: one for each processor)",
    )  # fmt: skip
    tokenize.add_argument(
        "--fast-encoder", action=argparse.BooleanOptionalAction, default=True,
        help="encode BPE by fastokens, checked against the tokenizer's own library (default: where it is installed)",
    )  # fmt: skip
    tokenize.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the tokenizer's end-of-sequence token (default: yes)",
    )  # fmt: skip
    tokenize.add_argument(
        "--skip-malformed", action="store_true",
        help="leave out lines that are no documents, naming each as file:line, instead of stopping at one",
    )  # fmt: skip
    tokenize.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None,
        help="a progress bar on stderr (default: when that is a terminal)",
    )  # fmt: skip

    from megatron_ru.data.actions import add_actions

    add_actions(actions, _usable_processors())

    check = actions.add_parser("check", help="is a dataset whole?", description=_check.__doc__)
    check.add_argument("prefix", metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    check.add_argument(
        "--vocab-size", type=int, metavar="N", help="also read every token id and require it to be below N"
    )

    demo = actions.add_parser("demo", help="Russian text to try things with", description=_demo.__doc__)
    demo.add_argument("--output", required=True, metavar="FILE", help="a .jsonl or .jsonl.gz to write")
    demo.add_argument("--limit", type=int, metavar="N", help="write the first N entries (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0; raises UserError."""
    from megatron_ru.data.actions import run_action

    own = {"tokenize": _tokenize, "check": _check, "demo": _demo}
    return own.get(arguments.action, run_action)(arguments)


def _tokenize(arguments: argparse.Namespace) -> int:
    """Encode the documents of JSON Lines files into a dataset for Megatron, in parallel."""
    from tqdm import tqdm

    from megatron_ru.text.jsonl import MalformedLines, require_readable_file
    from megatron_ru.tokens.tokenise import TokeniseSettings, tokenise

    for file in arguments.input:
        require_readable_file(file)
    shown = sys.stderr.isatty() if arguments.progress is None else arguments.progress
    bar: Any = tqdm(
        total=sum(os.path.getsize(file) for file in arguments.input),
        unit="B", unit_scale=True, desc="tokenise", disable=not shown, file=sys.stderr,
    )  # fmt: skip
    with bar:
        summary = tokenise(
            arguments.input,
            arguments.tokenizer,
            arguments.output,
            TokeniseSettings(
                text_field=arguments.text_field,
                append_eod=arguments.append_eod,
                workers=arguments.workers,
                fast=arguments.fast_encoder,
            ),
            # Through the bar, so that it is drawn again below the message.
            malformed=MalformedLines(
                skip=arguments.skip_malformed, report=lambda message: bar.write(message, file=sys.stderr)
            ),
            progress=bar.update,
        )
    print(
        f"{arguments.output}: {summary.documents} documents, {summary.tokens} tokens ({summary.dtype}) from "
        f"{summary.text_bytes} bytes in {summary.seconds:.1f} s: "
        f"{summary.tokens / summary.seconds:.0f} tokens/s, "
        f"{summary.text_bytes / summary.seconds / 1e6:.2f} MB/s"
    )
    done = summary.encoder
    if summary.slow_reason:
        print(f"encoded by the tokenizer's own library: {summary.slow_reason}")
    else:
        gave_up = f", which did {done.raised} that fastokens gave up" if done.raised else ""
        print(f"encoded by fastokens, {done.checked} of {done.pieces} pieces checked against the library{gave_up}")
    if summary.malformed:
        print(f"left out {summary.malformed} malformed lines", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Say what a dataset holds, or, in one sentence, what is wrong with it."""
    from megatron_ru.tokens.indexed_dataset import check_dataset

    found = check_dataset(arguments.prefix, arguments.vocab_size)
    highest = "" if found.max_token is None else f", highest id {found.max_token}"
    print(
        f"{arguments.prefix}: {found.documents} documents, {found.sequences} sequences, "
        f"{found.tokens} tokens ({found.dtype}, {found.bytes} bytes){highest}"
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """Write Russian dictionary entries from the package wiki-ru-wordnet as JSON Lines."""
    from itertools import islice

    from megatron_ru.foundation.errors import UserError
    from megatron_ru.text.jsonl import write_documents
    from megatron_ru.text.wordnet import wordnet_documents

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit is {arguments.limit}; it must be at least 1")
    count = write_documents(arguments.output, islice(wordnet_documents(), arguments.limit))
    print(f"{arguments.output}: {count} documents")
    return 0


def _usable_processors() -> int:
    """Those that this process may run on, which a batch system often makes fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
