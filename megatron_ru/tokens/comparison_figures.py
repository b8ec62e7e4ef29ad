"""What the figures of a report show."""

import re

from megatron_ru.figures.series import Series
from megatron_ru.tokens.comparison import ALL, ComparisonReport

_MEASURES = {
    "characters per token (rises)": "characters_per_token",
    "tokens per word (falls)": "tokens_per_word",
}


def bars_of(report: ComparisonReport) -> dict[str, dict[str, float | None]]:
    """{measure: {group and tokenizer: value}}."""
    return {
        title: {
            f"{group} · {name}": getattr(one, measure)
            for group, row in report.fertility.items()
            for name, one in row.items()
        }
        for title, measure in _MEASURES.items()
    }


def curves_of(report: ComparisonReport) -> dict[str, list[Series]]:
    """{measure: curves over the size of the vocabulary}; names that differ in digits alone belong to one curve."""
    groups = [group for group in report.fertility if group != ALL] or [ALL]
    families = dict.fromkeys(map(_family, report.habits))
    return {
        title: [
            Series(name=f"{family}, {group}" if family else group, x=tuple(xs), y=tuple(ys))
            for family in families
            for group in groups
            for xs, ys in [_points(report, family, group, measure)]
            if xs
        ]
        for title, measure in _MEASURES.items()
    }


def _points(report: ComparisonReport, family: str, group: str, measure: str) -> tuple[list[float], list[float]]:
    points = sorted(
        (float(report.habits[name].vocab_size), float(getattr(one, measure)))
        for name, one in report.fertility[group].items()
        if _family(name) == family
    )
    return [x for x, _ in points], [y for _, y in points]


def _family(name: str) -> str:
    return re.sub(r"[\W_]*\d+[kK]?[\W_]*", " ", name).strip()
