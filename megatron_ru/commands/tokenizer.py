"""Train a tokenizer on JSON Lines, or see how finely one cuts text.

megatron-ru tokenizer train --input ru.jsonl.gz --model-type unigram --vocab-size 32000 --output ru.model
megatron-ru tokenizer report --tokenizer ru.model --input ru.jsonl.gz en.jsonl.gz
"""

import argparse
import sys
import time

NAME = "tokenizer"
SUMMARY = "train a tokenizer (BPE or unigram, one token per digit) or report how finely one cuts text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions `train` and `report`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    train = actions.add_parser("train", help="train a sentencepiece tokenizer", description=_train.__doc__)
    _add_input(train)
    train.add_argument("--output", required=True, metavar="FILE.model", help="the model to write")
    train.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    train.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N",
        help="number of ids, with 4 control pieces and 256 bytes (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--normalization", choices=("identity", "nmt_nfkc"), default="identity",
        help="identity keeps every character; nmt_nfkc unifies compatible forms (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--character-coverage", type=float, default=0.9995, metavar="SHARE",
        help="share of characters that get a piece; bytes spell the rest (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--max-sentences", type=int, default=2_000_000, metavar="N",
        help="learn from N lines of the text, drawn at random (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, default=1234, help="of that draw (default: %(default)s)")

    report = actions.add_parser("report", help="characters per token and more", description=_report.__doc__)
    _add_input(report)
    report.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="sentencepiece .model or Hugging Face tokenizer.json",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0; raises UserError."""
    return {"train": _train, "report": _report}[arguments.action](arguments)


def _train(arguments: argparse.Namespace) -> int:
    """Train a sentencepiece tokenizer with one token per digit and bytes for what is not in it."""
    from megatron_ru.text.jsonl import MalformedLines, read_documents, require_readable_file
    from megatron_ru.tokenizer.fertility import has_one_token_per_digit
    from megatron_ru.tokenizer.loading import load_tokenizer
    from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer

    settings = TokenizerSettings(
        model_type=arguments.model_type,
        vocab_size=arguments.vocab_size,
        normalization=arguments.normalization,
        character_coverage=arguments.character_coverage,
        max_sentences=arguments.max_sentences,
        seed=arguments.seed,
    )
    for file in arguments.input:
        require_readable_file(file)
    malformed = MalformedLines(skip=arguments.skip_malformed)
    started = time.monotonic()
    documents = read_documents(arguments.input, arguments.text_field, malformed)
    lines = train_tokenizer((document.text for document in documents), arguments.output, settings)
    seconds = time.monotonic() - started
    digits = "yes" if has_one_token_per_digit(load_tokenizer(arguments.output)) else "no"
    print(
        f"{arguments.output}: {settings.model_type}, {settings.vocab_size} ids, learned from {lines} lines "
        f"in {seconds:.1f} s; one token per digit: {digits}"
    )
    _print_malformed(malformed.count)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Print, for each file, characters per token and tokens per word, and whether digits stand alone."""
    from megatron_ru.text.jsonl import MalformedLines, read_documents, require_readable_file
    from megatron_ru.tokenizer.fertility import digit_pieces, has_one_token_per_digit, measure_fertility
    from megatron_ru.tokenizer.loading import load_tokenizer

    for file in arguments.input:
        require_readable_file(file)
    tokenizer = load_tokenizer(arguments.tokenizer)
    malformed = MalformedLines(skip=arguments.skip_malformed)
    print(f"tokenizer: {arguments.tokenizer}, {tokenizer.vocab_size} ids")
    if has_one_token_per_digit(tokenizer):
        print("one token per digit: yes")
    else:
        others = [piece for piece in digit_pieces(tokenizer) if len(piece) > 1]
        examples = f" ({len(others)} longer pieces hold one: {', '.join(others[:5])})" if others else ""
        print(f"one token per digit: no{examples}")
    width = max(len("file"), *map(len, arguments.input))
    print(
        f"{'file':<{width}}  {'documents':>9}  {'characters':>11}  {'words':>10}  {'tokens':>10}  "
        "characters per token  tokens per word"
    )
    for file in arguments.input:
        documents = read_documents([file], arguments.text_field, malformed)
        found = measure_fertility(tokenizer, (document.text for document in documents))
        print(
            f"{file:<{width}}  {found.documents:>9}  {found.characters:>11}  {found.words:>10}  "
            f"{found.tokens:>10}  {found.characters_per_token:>20.3f}  {found.tokens_per_word:>15.3f}"
        )
    _print_malformed(malformed.count)
    return 0


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON Lines: .jsonl, .jsonl.gz, .jsonl.zst"
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-malformed", action="store_true",
        help="leave out lines that are no documents, naming each as file:line, instead of stopping at one",
    )  # fmt: skip


def _print_malformed(count: int) -> None:
    if count:
        print(f"left out {count} malformed lines", file=sys.stderr)
