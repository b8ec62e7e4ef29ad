"""The report on tokenizers as text, Markdown and JSON."""

import json
from dataclasses import asdict

from megatron_ru.tokens.comparison import ComparisonReport

type Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def tables(report: ComparisonReport) -> dict[str, Table]:
    """The tables by their titles."""
    names = list(report.habits)
    found: dict[str, Table] = {
        "Text": (
            ["group", "tokenizer", "documents", "characters per token", "tokens per word", "bytes per token", "tokens"],
            [
                [
                    group, name, str(one.documents), f"{one.characters_per_token:.3f}", f"{one.tokens_per_word:.3f}",
                    f"{one.bytes_per_token:.3f}", str(one.tokens),
                ]
                for group, row in report.fertility.items()
                for name, one in row.items()
            ],
        ),
        "Digits and blanks": (
            ["tokenizer", "ids", "one token per digit", *next(iter(report.habits.values())).blanks, "text comes back"],
            [
                [
                    name, str(one.vocab_size), _digits(one.one_token_per_digit, one.joined_digits),
                    *map(str, one.blanks.values()), "yes" if one.keeps_text else "no",
                ]
                for name, one in report.habits.items()
            ],
        ),
    }  # fmt: skip
    if report.words:
        found["Words"] = (
            ["word", *names],
            [[word, *(_spelled(row[name]) for name in names)] for word, row in report.words.items()],
        )
    if report.overlap:
        found["Pieces in both, of the smaller vocabulary"] = (
            ["", *names[1:]],
            [[first, *(_percent(report.overlap.get((first, second))) for second in names[1:])] for first in names[:-1]],
        )
    return found


def markdown(report: ComparisonReport) -> str:
    """The tables as Markdown, a heading above each."""
    parts = []
    for title, (header, rows) in tables(report).items():
        lines = [f"## {title}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def as_json(report: ComparisonReport) -> str:
    """Everything, ratios included."""
    fertility = {
        group: {
            name: {
                **asdict(one), "characters_per_token": one.characters_per_token,
                "tokens_per_word": one.tokens_per_word, "bytes_per_token": one.bytes_per_token,
            }
            for name, one in row.items()
        }
        for group, row in report.fertility.items()
    }  # fmt: skip
    return json.dumps(
        {
            "fertility": fertility,
            "habits": {name: asdict(one) for name, one in report.habits.items()},
            "overlap": [{"tokenizers": list(pair), "share": share} for pair, share in report.overlap.items()],
            "words": report.words,
        },
        ensure_ascii=False,
        indent=1,
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _digits(alone: bool, joined: tuple[str, ...]) -> str:
    if alone:
        return "yes"
    return f"no ({', '.join(joined)})" if joined else "no"


def _spelled(pieces: list[str]) -> str:
    # A blank that is part of a piece would be lost at its edges.
    return f"{len(pieces)}: {' '.join(piece.replace(' ', '▁') for piece in pieces)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
