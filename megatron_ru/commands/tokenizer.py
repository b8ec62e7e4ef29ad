"""Train tokenizers on JSON Lines or parquet, put several side by side, turn one format into the other.

megatron-ru tokenizer train --input ru.jsonl.gz --model-type unigram --vocab-size 32000 --output ru.model
megatron-ru tokenizer train --input ru.jsonl.gz --vocab-size 40000 --output ru_40k        a folder for Hugging Face
megatron-ru tokenizer report --tokenizer ru.model ru_40k --input ru.jsonl.gz --by domain --words интеллект
megatron-ru tokenizer convert ru.model ru_folder --check ru.jsonl.gz
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ru.text.jsonl import MalformedLines
    from megatron_ru.tokens.comparison import ComparisonReport

NAME = "tokenizer"
SUMMARY = "train a tokenizer (BPE or unigram, one token per digit), compare several, convert .model and tokenizer.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions `train`, `report` and `convert`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_train(actions.add_parser("train", help="learn a vocabulary from text", description=_train.__doc__))
    _add_report(actions.add_parser("report", help="several tokenizers on one text", description=_report.__doc__))
    _add_convert(actions.add_parser("convert", help="between .model and tokenizer.json", description=_convert.__doc__))


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0; raises UserError."""
    return {"train": _train, "report": _report, "convert": _convert}[arguments.action](arguments)


def _add_train(train: argparse.ArgumentParser) -> None:
    _add_input(train)
    train.add_argument(
        "--output", required=True, metavar="PATH",
        help="FILE.model is trained by sentencepiece, a folder (or its tokenizer.json) by Hugging Face's tokenizers",
    )  # fmt: skip
    train.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    train.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N",
        help="number of ids, with 4 control pieces and 256 bytes (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--normalization", choices=("identity", "nfc", "nfkc", "nmt_nfkc"), default="identity",
        help="identity keeps every character; nfc unifies forms of one letter, nfkc compatible ones too, nmt_nfkc also "
        "kinds of blanks (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--special-tokens", nargs="+", default=(), metavar="TOKEN",
        help="further control tokens, from id 4 on; never found in text",
    )  # fmt: skip
    train.add_argument(
        "--longest-piece", type=int, default=16, metavar="N", help="characters of a piece (default: %(default)s)"
    )
    train.add_argument(
        "--character-coverage", type=float, default=0.9995, metavar="SHARE",
        help="of a .model: share of characters that get a piece; bytes spell the rest (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--max-sentences", type=int, default=2_000_000, metavar="N",
        help="of a .model: learn from N lines of the text, drawn at random (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--sample", metavar="CHARACTERS",
        help="learn from so much of the text (500K, 200M, 2G), drawn in one pass and kept in memory",
    )  # fmt: skip
    train.add_argument(
        "--weights", metavar="DOMAIN=W,...", help="shares of domains in the sample (default: as they come)"
    )
    train.add_argument(
        "--domain-field", default="domain", metavar="NAME",
        help="the field that names a document's domain, or `file` for the name of its file (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")


def _add_report(report: argparse.ArgumentParser) -> None:
    _add_input(report)
    report.add_argument(
        "--tokenizer", required=True, nargs="+", metavar="[NAME=]PATH",
        help="sentencepiece .model, Hugging Face tokenizer.json or its folder",
    )  # fmt: skip
    report.add_argument(
        "--by", nargs="+", default=("file",), metavar="FIELD",
        help="group documents by a field such as domain, by file, or by script (default: file)",
    )  # fmt: skip
    report.add_argument("--words", nargs="+", default=(), metavar="WORD", help="show how each tokenizer spells these")
    report.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    report.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the measures of each group as bars")
    report.add_argument(
        "--curves", type=Path, metavar="FILE.png",
        help="draw the measures over the size of the vocabulary; tokenizers whose names differ in digits are one curve",
    )  # fmt: skip


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source", metavar="FROM", help="a .model, or a tokenizer.json or its folder")
    convert.add_argument("target", metavar="TO", help="a folder for tokenizer.json, or a FILE.model")
    convert.add_argument(
        "--check", nargs="+", required=True, metavar="FILE",
        help="text on which both must give the same ids: JSON Lines or parquet",
    )  # fmt: skip
    convert.add_argument("--text-field", default="text", metavar="NAME", help="default: %(default)s")
    convert.add_argument(
        "--accept-differences", action="store_true", help="write the result though ids differ on some texts"
    )


def _train(arguments: argparse.Namespace) -> int:
    """Learn a vocabulary with one token per digit and bytes for what is not in it."""
    from megatron_ru.text.jsonl import MalformedLines, read_documents, require_readable_file
    from megatron_ru.tokenizer.fertility import has_one_token_per_digit
    from megatron_ru.tokenizer.loading import load_tokenizer
    from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer
    from megatron_ru.tokenizer.training_hugging_face import train_hugging_face

    settings = TokenizerSettings(
        model_type=arguments.model_type,
        vocab_size=arguments.vocab_size,
        normalization=arguments.normalization,
        special_tokens=tuple(arguments.special_tokens),
        longest_piece=arguments.longest_piece,
        character_coverage=arguments.character_coverage,
        max_sentences=arguments.max_sentences,
        seed=arguments.seed,
    )
    for file in arguments.input:
        require_readable_file(file)
    malformed = MalformedLines(skip=arguments.skip_malformed)
    started = time.monotonic()
    texts: Iterable[str]
    if arguments.sample is None:
        texts = (document.text for document in read_documents(arguments.input, arguments.text_field, malformed))
    else:
        texts = _sampled(arguments, malformed)
    if arguments.output.endswith(".model"):
        count, unit = train_tokenizer(texts, arguments.output, settings), "lines"
    else:
        count, unit = train_hugging_face(texts, _folder_of(arguments.output), settings), "documents"
    seconds = time.monotonic() - started
    digits = "yes" if has_one_token_per_digit(load_tokenizer(arguments.output)) else "no"
    print(
        f"{arguments.output}: {settings.model_type}, {settings.vocab_size} ids, learned from {count} {unit} "
        f"in {seconds:.1f} s; one token per digit: {digits}"
    )
    _print_malformed(malformed.count)
    return 0


def _folder_of(output: str) -> Path:
    from megatron_ru.foundation.errors import UserError

    path = Path(output)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        raise UserError(f"{output} is no name for a tokenizer; give a folder, FOLDER/tokenizer.json, or FILE.model")
    return path.parent if path.name == "tokenizer.json" else path


def _sampled(arguments: argparse.Namespace, malformed: "MalformedLines") -> list[str]:
    from megatron_ru.text.jsonl import read_documents
    from megatron_ru.text.sampling import SampleSettings, draw_sample, parse_characters, parse_weights

    settings = SampleSettings(
        characters=parse_characters(arguments.sample),
        weights=parse_weights(arguments.weights or ""),
        domain_field=arguments.domain_field,
        seed=arguments.seed,
    )
    sample = draw_sample(read_documents(arguments.input, arguments.text_field, malformed), settings)
    for domain, share in sample.shares.items():
        short = "" if share.drawn >= share.wanted else ": there is no more of it"
        print(
            f"sample{f' of {domain}' if domain else ''}: {share.documents} documents, {share.drawn} of {share.wanted} "
            f"characters{short}"
        )
    if sample.left_out:
        print(f"sample: {sample.left_out} documents of domains without a weight were left out")
    return sample.texts


def _report(arguments: argparse.Namespace) -> int:
    """Print, for each group of documents and each tokenizer, characters per token, tokens per word and bytes per token,
    what is done to digits and blanks, how words are spelled, and how much of the vocabularies is common."""
    from megatron_ru.figures.png import require_matplotlib
    from megatron_ru.figures.text_table import text_table
    from megatron_ru.foundation.files import requested_output
    from megatron_ru.text.jsonl import MalformedLines, read_documents, require_readable_file
    from megatron_ru.tokens.comparison import report_on
    from megatron_ru.tokens.comparison_report import as_json, markdown, tables
    from megatron_ru.tokens.encoding import load_encoder

    for file in arguments.input:
        require_readable_file(file)
    for path in (arguments.plot, arguments.curves):
        if path is not None:
            require_matplotlib(path.parent / ".matplotlib")
    encoders = {name: load_encoder(path) for name, path in _named(arguments.tokenizer).items()}
    malformed = MalformedLines(skip=arguments.skip_malformed)
    report = report_on(
        encoders,
        read_documents(arguments.input, arguments.text_field, malformed),
        arguments.by,
        arguments.words,
    )
    for index, (title, (header, rows)) in enumerate(tables(report).items()):
        numbers = [column for column, word in enumerate(header) if rows and rows[0][column][:1].isdigit() and word]
        print(f"{'' if not index else chr(10)}{title}\n\n{text_table(header, rows, numbers if index < 2 else ())}")
    for path, content in ((arguments.json, as_json), (arguments.markdown, markdown)):
        if path is not None:
            with requested_output(path) as stream:
                stream.write(content(report).encode("utf-8"))
    _draw(arguments, report)
    _print_malformed(malformed.count)
    return 0


def _draw(arguments: argparse.Namespace, report: "ComparisonReport") -> None:
    from megatron_ru.figures.png import write_bars, write_curve_panels
    from megatron_ru.tokens.comparison_figures import bars_of, curves_of

    if arguments.plot is not None:
        write_bars(arguments.plot, "Tokenizers on the same text", bars_of(report))
    if arguments.curves is not None:
        write_curve_panels(
            arguments.curves, "Tokenizers by the size of their vocabulary", curves_of(report), "ids in the vocabulary"
        )


def _convert(arguments: argparse.Namespace) -> int:
    """Turn a sentencepiece .model into a folder for Hugging Face, or back, and look whether both give the same ids."""
    from megatron_ru.text.jsonl import read_documents, require_readable_file
    from megatron_ru.tokenizer.converting import convert

    for file in arguments.check:
        require_readable_file(file)
    texts = (document.text for document in read_documents(arguments.check, arguments.text_field))
    found = convert(arguments.source, arguments.target, texts, accept_differences=arguments.accept_differences)
    if found.differing:
        print(f"ids differ on {found.differing} of {found.texts} texts; the first: {found.example}", file=sys.stderr)
        print(f"{arguments.target}: written, though it is not equal to {arguments.source}")
    else:
        print(
            f"{arguments.target}: the same ids as {arguments.source} on {found.texts} texts, {found.tokens} tokens "
            "(the given text, damaged copies of it, the vocabulary, difficult Unicode)"
        )
    return 0


def _named(words: list[str]) -> dict[str, str]:
    """{name: path}; a path without a name has that of its file, or of its folder."""
    from megatron_ru.foundation.errors import UserError

    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            path = word
            name = Path(word).resolve().parent.name if word.endswith("tokenizer.json") else Path(word).stem
        if name in found:
            raise UserError(f"two tokenizers are called {name!r} ({found[name]}, {path}); give names: NAME=PATH")
        found[name] = path
    return found


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help="JSON Lines or parquet: .jsonl, .jsonl.gz, .jsonl.zst, .parquet",
    )  # fmt: skip
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
