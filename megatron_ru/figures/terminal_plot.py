"""Curves in a terminal, drawn with braille characters: each holds 2 by 4 dots (Unicode 15.1, block U+2800)."""

from collections.abc import Sequence

from megatron_ru.figures.series import Series

# Bits of the dots by [row][column] of a cell.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARKS = "●◆▲■"


def terminal_plot(series: Sequence[Series], width: int = 72, height: int = 14, x_label: str = "") -> str:
    """A plot of `width` by `height` characters, axes and legend apart, its lines joined by line feeds.

    The first series is a line of dots; the others are drawn over it with a mark of their own at each point.
    Series without points are left out; with no point at all the text is empty.
    """
    drawn = [one for one in series if one.x]
    if not drawn:
        return ""
    horizontal = _Axis([x for one in drawn for x in one.x], 2 * width)
    vertical = _Axis([y for one in drawn for y in one.y], 4 * height)
    cells = [[0] * width for _ in range(height)]
    points = [(horizontal.dot(x), vertical.dot(y)) for x, y in zip(drawn[0].x, drawn[0].y, strict=True)]
    for start, end in zip(points, points[1:] or points, strict=False):
        for column, row in _line(start, end):
            down = 4 * height - 1 - row
            cells[down // 4][column // 2] |= _DOTS[down % 4][column % 2]
    rows = [[chr(0x2800 + bits) if bits else " " for bits in line] for line in cells]
    for one, mark in zip(drawn[1:], _MARKS, strict=False):
        for x, y in zip(one.x, one.y, strict=True):
            rows[height - 1 - vertical.dot(y) // 4][horizontal.dot(x) // 2] = mark
    return "\n".join([*_framed(rows, horizontal, vertical, x_label), _legend(drawn)])


class _Axis:
    """The dots of one direction, for values from the lowest to the highest."""

    def __init__(self, values: Sequence[float], dots: int):
        self.low, self.high, self._dots = min(values), max(values), dots

    def dot(self, value: float) -> int:
        if self.high == self.low:
            return self._dots // 2
        return round((value - self.low) / (self.high - self.low) * (self._dots - 1))


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        tuple(round(a + (b - a) * step / steps) for a, b in zip(start, end, strict=True))  # type: ignore[misc]
        for step in range(steps + 1)
    ]


def _framed(rows: list[list[str]], horizontal: _Axis, vertical: _Axis, x_label: str) -> list[str]:
    height, width = len(rows), len(rows[0])
    named = {0: vertical.high, height // 2: (vertical.high + vertical.low) / 2, height - 1: vertical.low}
    labels = {row: f"{value:.2f}" for row, value in named.items()}
    margin = max(map(len, labels.values()))
    lines = [
        f"{labels.get(row, ''):>{margin}} {'┤' if row in labels else '│'}{''.join(cells).rstrip()}"
        for row, cells in enumerate(rows)
    ]
    left, right = f"{horizontal.low:g}", f"{horizontal.high:g}"
    lines.append(f"{'':>{margin}} └{'─' * width}")
    lines.append(f"{'':>{margin}}  {left}{x_label:^{max(width - len(left) - len(right), 0)}}{right}")
    return lines


def _legend(series: Sequence[Series]) -> str:
    marks = "⠒" + _MARKS
    return "  ".join(f"{mark} {one.name}" for mark, one in zip(marks, series, strict=False))
