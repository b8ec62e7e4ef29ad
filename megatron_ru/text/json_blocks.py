"""Texts of JSON lines, a block of lines at a time: found by numpy, proved by the parser, never decoded.

A parser makes a string of every text only to have it encoded again. Here the quotes of a block are found at once, and
one string of each line is guessed to be its text. The guess is proved: with a mark in the place of that string the
parser must take the line and find the mark as the value of the text field; and the string itself must be one, without
control characters, with escapes that are known, in sound UTF-8. What is not proved is left to the caller's parser.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ru.text.jsonl import text_of

_Positions = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]

_MARK = b"\x7f"

_LARGEST = 8 << 20
"""Bytes of a block that is looked into: the places of all quotes in a line of 100 MB would need too much memory."""

_PAUSE = 15
"""So many blocks are left to the parser behind one of which most lines were: texts full of \\u, say."""

_ESCAPED_SO: _Mask = np.isin(np.arange(256), np.frombuffer(b'"\\nrtbf', np.uint8))
"""What may follow a backslash in a text as `jsonl.spelling` spells it."""

_SECOND_BYTES = ((0xE0, 0xA0, 0xBF), (0xED, 0x80, 0x9F), (0xF0, 0x90, 0xBF), (0xF4, 0x80, 0x8F))
"""Lead bytes, and the bounds of the second byte where they are narrower: table 3-7 of the Unicode standard."""


class BlockTexts(NamedTuple):
    """Of each line of a block."""

    ends: _Positions
    """Where it ends, behind its line break."""
    spellings: list[bytes | None]
    """Its text as `jsonl.spelling` spells it; None where it was not found, which says nothing about the line."""
    characters: _Positions
    """Of its text; 0 where that was not found."""


class BlockReader:
    """Reads blocks of lines; fastest where lines have the same fields in the same order."""

    def __init__(self, field: str) -> None:
        self._field = field
        # Which string of a line is tried first: where the text was found the last time. 1 is the first field's value.
        self._string = 1
        self._pause = 0

    def read(self, block: bytes) -> BlockTexts:
        """The texts of a block of whole lines; the last may lack its line break."""
        values = np.frombuffer(block, np.uint8)
        if self._pause or len(block) > _LARGEST:
            self._pause = max(0, self._pause - 1)
            ends = _ends(np.flatnonzero(values == ord("\n")), len(block))
            return BlockTexts(ends, [None] * len(ends), np.zeros(len(ends), np.int64))
        lines = _Lines(block, values, self._field)
        lines.find(np.full(len(lines.ends), self._string))
        if None in lines.spellings:
            found = lines.find(lines.longest_strings())
            self._string = self._string if found is None else found
        if 2 * lines.spellings.count(None) > len(lines.ends):
            self._pause = _PAUSE
        return BlockTexts(lines.ends, lines.spellings, lines.characters)


class _Lines:
    """The lines of one block while their texts are looked for."""

    def __init__(self, block: bytes, values: npt.NDArray[np.uint8], field: str) -> None:
        self._block, self._field = block, field
        # Below 32, or a quote: 34 ^ 2 is 32, and nothing else is moved across the bound.
        special = np.flatnonzero(((values ^ 2) <= 32) | (values == ord("\\")))
        kinds = values[special]
        self.ends = _ends(special[kinds == ord("\n")], len(block))
        self._begins = np.concatenate([[0], self.ends[:-1]])
        self._escapes = _escapes(special[kinds == ord("\\")])
        escaped = values[np.minimum(self._escapes + 1, len(values) - 1)]
        self._quotes = special[kinds == ord('"')]
        inner = np.searchsorted(self._quotes, self._escapes[escaped == ord('"')] + 1)
        self._quotes = np.delete(self._quotes, inner)
        self._first_quotes = np.searchsorted(self._quotes, np.append(self._begins, len(block)))
        controls = special[(kinds < 32) & (kinds != ord("\n"))]
        # What no text has that is taken.
        self._odd = np.sort(np.concatenate([controls, self._escapes[~_ESCAPED_SO[escaped]]]))
        self._later_bytes, wrong = _utf8(block, values)
        self._sound = ~_any_within(wrong, self._begins, self.ends)
        # Of a character cut off at the end of a block nothing is seen.
        self._sound[-1:] &= block.endswith(b"\n")
        self.spellings: list[bytes | None] = [None] * len(self.ends)
        self.characters = np.zeros(len(self.ends), np.int64)

    def find(self, strings: _Positions) -> int | None:
        """Takes the string of this number (counted in its line from 0, names of fields too) for the text of each line,
        where that is not known and where this is proved. Returns the last number that was right, None if none was."""
        found = -1
        known = np.array([spelling is not None for spelling in self.spellings], dtype=bool)
        quotes = self._first_quotes[:-1] + 2 * strings
        lines = np.flatnonzero(self._sound & ~known & (strings >= 0) & (quotes + 1 < self._first_quotes[1:]))
        starts, stops = self._quotes[quotes[lines]] + 1, self._quotes[quotes[lines] + 1]
        plain = ~_any_within(self._odd, starts, stops)
        lines, starts, stops = lines[plain], starts[plain], stops[plain]
        escapes = np.searchsorted(self._escapes, stops) - np.searchsorted(self._escapes, starts)
        characters = stops - starts - escapes
        block, later_bytes, count = self._block, self._later_bytes, np.count_nonzero
        columns = (lines, self._begins[lines], starts, stops, self.ends[lines], characters)
        for line, begin, start, stop, end, length in zip(*(column.tolist() for column in columns), strict=True):
            if self._is_text(block[begin:start] + _MARK + block[stop:end]):
                self.spellings[line] = block[start:stop]
                self.characters[line] = length if later_bytes is None else length - count(later_bytes[start:stop])
                found = line
        return int(strings[found]) if found >= 0 else None

    def longest_strings(self) -> _Positions:
        """The number of the longest string of each line whose text is not known, else -1."""
        longest = np.full(len(self.ends), -1, np.int64)
        for line, spelling in enumerate(self.spellings):
            quotes = self._quotes[self._first_quotes[line] : self._first_quotes[line + 1]]
            if spelling is None and len(quotes) > 1:
                longest[line] = np.argmax(quotes[1::2] - quotes[: len(quotes) // 2 * 2 : 2])
        return longest

    def _is_text(self, marked: bytes) -> bool:
        """Whether the parser finds the mark as the text of a line in which a string was replaced by it."""
        try:
            # With \u the mark has another spelling.
            return text_of(marked, self._field) == "\x7f" and marked.count(_MARK) == 1 and b"\\u" not in marked
        except Exception:
            return False


def _ends(line_breaks: _Positions, size: int) -> _Positions:
    ends = line_breaks + 1
    return ends if len(ends) and ends[-1] == size else np.append(ends, size)


def _any_within(points: _Positions, starts: _Positions, stops: _Positions) -> _Mask:
    """Whether any of the sorted `points` lies in [start, stop)."""
    if not len(points):
        return np.zeros(len(starts), bool)
    within: _Mask = np.searchsorted(points, starts) < np.searchsorted(points, stops)
    return within


def _escapes(backslashes: _Positions) -> _Positions:
    """Those that begin an escape: the first, third, ... of a run."""
    follows = np.zeros(len(backslashes), bool)
    follows[1:] = np.diff(backslashes) == 1
    if not follows.any():
        return backslashes
    places = np.arange(len(backslashes))
    first = np.maximum.accumulate(np.where(follows, 0, places))
    begin: _Positions = backslashes[(places - first) & 1 == 0]
    return begin


def _utf8(block: bytes, values: npt.NDArray[np.uint8]) -> tuple[_Mask | None, _Positions]:
    """(the bytes that continue a character, None if there are none; sorted places of errors, each within the line
    that is wrong or behind its end)."""
    if block.isascii():
        return None, np.empty(0, np.int64)
    later = values.view(np.int8) < -64
    expected = np.zeros(len(values), bool)
    np.greater_equal(values[:-1], 0xC0, out=expected[1:])
    expected[2:] |= values[:-2] >= 0xE0
    largest = int(values.max())
    if largest >= 0xF0:
        expected[3:] |= values[:-3] >= 0xF0
    wrong = [np.flatnonzero(expected != later)]
    for lead, low, high in _SECOND_BYTES:
        if bytes([lead]) in block:
            places = np.flatnonzero(values == lead)
            second = values[np.minimum(places + 1, len(values) - 1)]
            wrong.append(places[(second < low) | (second > high)])
    for never in (0xC0, 0xC1, *range(0xF5, largest + 1)):
        if bytes([never]) in block:
            wrong.append(np.flatnonzero(values == never))
    return later, np.sort(np.concatenate(wrong))
