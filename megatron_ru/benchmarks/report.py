"""A run as text: tables for the terminal and for Markdown, JSON, and bars."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ru.benchmarks.result import OURS, PASSES, Comparison, Pair, Report, Row
from megatron_ru.figures.text_table import text_table
from megatron_ru.foundation.files import atomic_output

_NOTHING = "–"
# Missing cases that a line of the terminal names.
_NAMED = 6


def summary(report: Report) -> str:
    """For the terminal: ours in every case with the fastest peer beside it, what failed, and the host's time."""
    beside = {(one.op, one.case): one for one in report.comparisons()}
    rows = []
    for row in report.rows:
        if row.contender != OURS:
            continue
        other = beside.get((row.op, row.case))
        rows.append([
            row.op, row.case, row.dtype, *_times(row), _percents(row, report.ceiling),
            _error(row), _peer(other),
        ])  # fmt: skip
    header = ["op", "case", "dtype", "fwd µs", "bwd µs", "both µs", "% fwd/bwd/both", "error", "fastest peer"]
    parts = [text_table(header, rows, right=(3, 4, 5))]
    comparisons = list(beside.values())
    if comparisons:
        ahead = sum(one.ratio > 1 for one in comparisons)
        least = min(comparisons, key=lambda one: one.ratio)
        parts.append(
            f"faster than every peer in {ahead} of {len(comparisons)} cases; "
            f"least: {least.op} {least.case}, {least.ratio:.2f} times {least.peer}"
        )
    hosts = [f"{row.op} {row.host_microseconds:.1f}" for row in ours_with_host(report.rows)]
    if hosts:
        parts.append(f"host, µs for a forward call: {', '.join(hosts)}")
    parts += _notes(report.rows)
    if report.missing:
        named = [str(one) for one in report.missing[:_NAMED]]
        others = f" and {len(report.missing) - _NAMED} others" if len(report.missing) > _NAMED else ""
        parts.append(f"{_missing(report)}: {', '.join(named)}{others}")
    how = ", ".join(sorted({row.timed for row in report.rows if row.timed})) or "nothing"
    parts.append(
        f"timed: {how}; percent of a copy's {report.ceiling:.0f} GB/s by the fewest bytes; {report.seconds:.0f} s"
    )
    return "\n".join(parts)


def markdown(report: Report) -> str:
    """A page: how it was measured, then a table for each op with all contenders."""
    lines = [
        "# Ops",
        "",
        f"- command: `{report.command}`",
        f"- date: {report.date}",
        f"- device: {report.device_name}",
        *(f"- {name}: {value}" for name, value in report.environment.items()),
        *(f"- against {name}: {value}" for name, value in report.peers.items()),
        f"- copy ceiling: {report.ceiling:.0f} GB/s, bytes read and written",
        *([f"- {_missing(report)}: {', '.join(map(str, report.missing))}"] if report.missing else []),
        "",
        "Times in µs, medians. Percent of the copy ceiling by the fewest bytes that can move: forward / backward /",
        "both. Error: ‖result − exact‖ / ‖exact‖ against float64, outputs / gradients, and the worst entry in units in",
        "the last place. Ratio: the contender's time over ours, forward and backward together.",
    ]
    for op in dict.fromkeys(row.op for row in report.rows):
        rows = [row for row in report.rows if row.op == op]
        lines += ["", f"## {op}", "", *_markdown_table(rows, report.ceiling)]
    lines += [
        "", "## Fastest peer", "",
        "The fastest in forward and backward together. Each pass: ours / its, and its time over ours; below 1 it wins.",
        "", *_markdown_comparisons(report.comparisons()),
    ]  # fmt: skip
    hosts = [row for row in report.rows if row.host_microseconds is not None]
    if hosts:
        lines += ["", "## Host", "", "Time of the host for a forward call with gradients on, µs, median.", ""]
        lines += _markdown_rows(
            ["op", "contender", "µs"], [[row.op, row.contender, f"{row.host_microseconds:.1f}"] for row in hosts], {2}
        )
    return "\n".join(lines) + "\n"


def write_json(report: Report, path: Path) -> None:
    """Everything, for other programs."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(report.json(), stream, ensure_ascii=False, indent=1)
        stream.write("\n")


def write_markdown(report: Report, path: Path) -> None:
    """The page of `markdown`."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        stream.write(markdown(report))


def write_plot(report: Report, path: Path) -> None:
    """Percent of the copy ceiling, forward and backward together: a bar for ours in each case, marks for the others."""
    from megatron_ru.figures.png import write_bars_with_marks

    bars: dict[str, float] = {}
    marks: dict[str, dict[str, float]] = {}
    for row in report.rows:
        percent = row.percent("both" if row.both is not None else "forward", report.ceiling)
        if percent is None or row.flops:
            continue
        values = bars if row.contender == OURS else marks.setdefault(row.contender, {})
        values[f"{row.op} {row.case}"] = percent
    title = f"{report.device_name}: the fewest bytes over time, against a copy of {report.ceiling:.0f} GB/s"
    write_bars_with_marks(path, title, "percent of the copy, forward and backward", bars, marks, OURS)


def ours_with_host(rows: Iterable[Row]) -> list[Row]:
    """Our rows whose host time was measured."""
    return [row for row in rows if row.contender == OURS and row.host_microseconds is not None]


def _markdown_table(rows: Sequence[Row], ceiling: float) -> list[str]:
    ours = {
        (row.case, row.dtype): whole.microseconds for row in rows if row.contender == OURS and (whole := row.whole())
    }
    header = [
        "case",
        "contender",
        "forward",
        "backward",
        "both",
        "GB/s",
        "% f/b/both",
        "error",
        "ulps",
        "extra",
        "ratio",
        "note",
    ]
    table = []
    for row in rows:
        whole, mine = row.whole(), ours.get((row.case, row.dtype))
        note = row.note if row.status == "ok" else f"{row.status}: {row.note}"
        bandwidth = row.bandwidth("both" if row.both is not None else "forward")
        table.append([
            f"{row.case} {row.dtype}", row.contender, *_times(row),
            _NOTHING if bandwidth is None else f"{bandwidth:.0f}",
            _percents(row, ceiling), _error(row), _ulps(row), _bytes(row.extra_bytes),
            _NOTHING if whole is None or mine is None else f"{whole.microseconds / mine:.2f}", note.replace("|", "\\|"),
        ])  # fmt: skip
    return _markdown_rows(header, table, {2, 3, 4, 5, 10})


def _markdown_comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    rows = [
        [
            one.op, one.case, f"{one.ours:.1f}", one.peer, f"{one.theirs:.1f}", f"{one.ratio:.2f}",
            *_pair(one.forward), *_pair(one.backward),
        ]
        for one in comparisons
    ]  # fmt: skip
    header = ["op", "case", "ours", "fastest peer", "its time", "ratio", "forward", "ratio", "backward", "ratio"]
    return _markdown_rows(header, rows, {2, 4, 5, 6, 7, 8, 9})


def _markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> list[str]:
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _times(row: Row) -> list[str]:
    timings = (row.timing(name) for name in PASSES)
    return [_NOTHING if timing is None else f"{timing.microseconds:.1f}" for timing in timings]


def _percents(row: Row, ceiling: float) -> str:
    if row.status != "ok":
        return row.status
    speed = row.tflops()
    if speed is not None:
        return f"{speed:.0f} TFLOP/s"
    shares = (row.percent(name, ceiling) for name in PASSES)
    return "/".join(_NOTHING if share is None else f"{share:.0f}" for share in shares)


def _error(row: Row) -> str:
    found = row.accuracy
    if found is None:
        return _NOTHING
    gradient = "" if found.gradient is None else f" / {found.gradient:.1e}"
    return f"{found.output:.1e}{gradient}"


def _ulps(row: Row) -> str:
    found = row.accuracy
    if found is None:
        return _NOTHING
    gradient = "" if found.gradient_ulps is None else f" / {found.gradient_ulps:.2g}"
    return f"{found.ulps:.2g}{gradient}"


def _peer(found: Comparison | None) -> str:
    return _NOTHING if found is None else f"{found.ratio:.2f}× {found.peer} ({found.theirs:.1f})"


def _pair(found: Pair | None) -> tuple[str, str]:
    return (_NOTHING, _NOTHING) if found is None else (f"{found.ours:.1f} / {found.theirs:.1f}", f"{found.ratio:.2f}")


def _missing(report: Report) -> str:
    return f"interrupted, {len(report.missing)} of {report.cases} cases missing"


def _bytes(count: int | None) -> str:
    return _NOTHING if count is None else f"{count / 1e6:.0f} MB"


def _notes(rows: Iterable[Row]) -> list[str]:
    """What is to be said of contenders, each thing once with the cases that it is said of. That a library lacks a
    setting is left to the tables of all contenders."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.note and row.status != "unsupported":
            prefix = "" if row.status == "ok" else f"{row.status}: "
            found.setdefault(f"{row.contender}: {prefix}{row.note}", []).append(f"{row.op} {row.case}")
    return [
        f"{said} ({', '.join(cases[:3])}{' and others' if len(cases) > 3 else ''})" for said, cases in found.items()
    ]
