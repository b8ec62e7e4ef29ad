"""`megatron-ru bench tokenise`: its flags and what they start."""

import argparse
from pathlib import Path

_SECTION = """# Tokenising

`{command}`

Text is made of the inputs by repetition; in each repetition but the first, lines of a document are in another order,
two words of each line have changed places and numbers are others. Documents that spell a control token are left out:
Megatron-LM and datatrove take it for the token itself, we for text. Each contender is a process of its own;
CPU-seconds are those of all its processes, the largest process is the one with the highest resident memory.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines or parquet")
    parser.add_argument("--tokenizer", nargs="+", required=True, type=Path, metavar="PATH", help="one section for each")
    parser.add_argument(
        "--megabytes", type=float, default=300, metavar="N", help="of text, made by repetition (default: %(default)s)"
    )
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="a checkout with tools/preprocess_data.py")
    parser.add_argument(
        "--datatrove", action=argparse.BooleanOptionalAction, default=True, help="let it take part (default: yes)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="of each contender (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=2, metavar="N", help="the fewest CPU-seconds count (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("bench_tokenise"), metavar="DIR",
        help="for text and outputs, of which the text is kept and used again (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")


def run(arguments: argparse.Namespace) -> int:
    """Tokenise one text to .bin and .idx by us, by Megatron-LM's preprocess_data.py and by datatrove, and compare
    CPU time, memory and the files."""
    import json

    from megatron_ru.benchmarks.tokenise_contest import ContestSettings, as_json, markdown
    from megatron_ru.benchmarks.tokenise_contest import run as run_contest
    from megatron_ru.benchmarks.varied_corpus import write_varied_corpus
    from megatron_ru.foundation.files import atomic_output
    from megatron_ru.tokenizer.loading import load_tokenizer

    text = arguments.folder / f"text_{arguments.megabytes:g}" / "text.jsonl"
    if not text.exists():
        control = {piece for path in arguments.tokenizer for piece in load_tokenizer(path).control_pieces()}
        size = round(arguments.megabytes * 1e6)
        documents, left_out = write_varied_corpus(arguments.input, text, size, sorted(control))
        print(f"{text}: {documents} documents; {left_out} that spell a control token were left out")
    page, data = _SECTION.format(command=_command(arguments)), []
    for tokenizer in arguments.tokenizer:
        settings = ContestSettings(
            text=text, tokenizer=tokenizer, scratch=arguments.folder / "scratch", megatron_lm=arguments.megatron_lm,
            datatrove=arguments.datatrove, workers=arguments.workers, repeats=arguments.repeats,
        )  # fmt: skip
        results = run_contest(settings)
        section = f"## {tokenizer.name}\n\n{markdown(results, settings)}\n"
        print(f"\n{section}", flush=True)
        page += section
        data.append(json.loads(as_json(results, settings)))
    for path, content in ((arguments.markdown, page.rstrip() + "\n"), (arguments.json, json.dumps(data, indent=1))):
        if path is not None:
            with atomic_output(path) as stream:
                stream.write(content.encode("utf-8"))
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """The command with the names of files alone: where they lie is nobody's concern."""
    inputs = " ".join(Path(file).name for file in arguments.input)
    tokenizers = " ".join(path.name for path in arguments.tokenizer)
    peers = " --megatron-lm Megatron-LM" if arguments.megatron_lm else ""
    return (
        f"megatron-ru bench tokenise --input {inputs} --tokenizer {tokenizers}{peers} "
        f"--megabytes {arguments.megabytes:g} --workers {arguments.workers} --repeats {arguments.repeats}"
    )
