"""What a user gives, written into bash so that it stays exactly that."""

import re
import shlex
import unicodedata
from collections.abc import Sequence

from megatron_ru.foundation.errors import UserError

# Marks that change the direction of text: a script that holds one does not read as it runs.
_DIRECTION_MARKS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def quoted(words: Sequence[str]) -> str:
    """The words for one line of bash, each of which bash reads back unchanged."""
    return " ".join(shlex.quote(word) for word in words)


def quoted_lines(words: Sequence[str], indent: str = "    ") -> str:
    """The same over several lines, a new one before each flag, for the inside of a bash array."""
    lines: list[list[str]] = []
    for word in words:
        if not lines or word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return "\n".join(indent + quoted(line) for line in lines)


def check_one_line(what: str, value: str) -> None:
    """Raises UserError for newlines, other control characters, direction marks and what is no UTF-8."""
    for place, character in enumerate(value):
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTION_MARKS:
            raise UserError(
                f"{what} holds U+{ord(character):04X} at character {place + 1}; a job script takes one line of "
                f"printable text there: take it out of {value!r}"
            )


def check_matches(what: str, value: str, pattern: str, expected: str) -> None:
    """Raises UserError unless the whole of `value` matches; `expected` says in words what does."""
    if re.fullmatch(pattern, value) is None:
        raise UserError(f"{what} is {value!r}; expected {expected}")


def check_path(what: str, path: str) -> None:
    """Raises UserError for a path that is empty, an option for whoever reads it, or not one line."""
    check_one_line(what, path)
    if not path.strip():
        raise UserError(f"{what} is empty: give a path, or leave it out")
    if path.startswith("-"):
        raise UserError(f"{what} is {path!r}, which programs read as an option: write ./{path}")
