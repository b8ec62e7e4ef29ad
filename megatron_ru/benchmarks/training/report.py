"""A training comparison as text: tables for the terminal and for Markdown, and bars. Nothing here needs torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ru.benchmarks.training.result import TrainingReport, TrainingRow
from megatron_ru.figures.text_table import text_table
from megatron_ru.foundation.files import atomic_output
from megatron_ru.models.step_flops import FORMULA, MFU_FORMULA
from megatron_ru.plugin.kernel_causes import ATTENTION, CAUSES, GEMM

_NOTHING = "–"
_GAPS = "no kernel runs"
_REST = "steps that are not traced take longer by"


def summary(report: TrainingReport) -> str:
    """For the terminal."""
    header, rows = speed_table(report)
    parts = [_what(report), text_table(header, rows, right=range(1, len(header)))]
    parts += _notes(report)
    parts += comparisons(report)
    for row in _broken_down(report):
        header, rows = cause_table(row, _beside(report, row), report.roof)
        parts.append(f"{row.contender}: microseconds of a step by cause")
        parts.append(text_table(header, rows, right=range(1, len(header))))
    parts.append(_formulas(report))
    return "\n".join(parts)


def markdown(report: TrainingReport) -> str:
    """A page with the same tables."""
    header, rows = speed_table(report)
    lines = [
        f"# {'Fused ladder' if report.kind == 'fused-ladder' else 'Training speed'}", "",
        f"- command: `{report.command}`", f"- date: {report.date}", f"- device: {report.device_name}",
        *(f"- {name} {value}" for name, value in _versions(report).items()), f"- {_what(report)}",
        *(f"- {note}" for note in _notes(report)), "", *_markdown_rows(header, rows), "",
        *(f"- {line}" for line in comparisons(report)),
    ]  # fmt: skip
    for row in _broken_down(report):
        header, rows = cause_table(row, _beside(report, row), report.roof)
        lines += ["", f"## {row.contender} by cause", "", *_markdown_rows(header, rows)]
    return "\n".join([*lines, "", _formulas(report), ""])


def speed_table(report: TrainingReport) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each contender); in a ladder with the gain over the rung before and over the first."""
    header = ["contender", "fwd+bwd ms", "MFU %", "step ms", "MFU %", "next step ms", "tokens/s", "TFLOP/s", "peak GiB",
              "loss"]  # fmt: skip
    ladder = report.kind == "fused-ladder"
    header += ["× rung before", "× first, fwd+bwd", "× first, step"] if ladder else ["× ours, fwd+bwd", "× ours, step"]
    rows, before = [], None
    first = next(iter(report.done), None)
    ours = next((row for row in report.done if row.ours), None)
    for row in report.rows:
        if row.status != "ok":
            rows.append([row.contender, row.status, *[_NOTHING] * (len(header) - 2)])
            continue
        cells = [
            row.contender, _milliseconds(row, "forward_backward_seconds"), _percent(row, "forward_backward_mfu"),
            _milliseconds(row, "step_seconds"), _percent(row, "mfu"), _milliseconds(row, "begin_to_begin_seconds"),
            _number(row, "tokens_per_second", ",.0f"),
            _number(row, "tflop_s_per_gpu", ".1f"), _number(row, "peak_memory_gib", ".1f"),
            _losses(row),
        ]  # fmt: skip
        if ladder:
            cells += [_ratio(before, row, "step_seconds"), _ratio(first, row, "forward_backward_seconds"),
                      _ratio(first, row, "step_seconds")]  # fmt: skip
            before = row
        else:
            cells += [_ratio(row, ours, "forward_backward_seconds"), _ratio(row, ours, "step_seconds")]
        rows.append(cells)
    return header, rows


def comparisons(report: TrainingReport) -> list[str]:
    """Ours beside the best peer, in a sentence for each quantity."""
    found = []
    kinds = (
        ("forward and backward", "forward_backward_seconds", 1e3, "ms"),
        ("whole step", "step_seconds", 1e3, "ms"),
        ("peak memory", "peak_memory_gib", 1, "GiB"),
    )
    for row in (row for row in report.done if row.ours):
        for what, name, factor, unit in kinds:
            peer, mine = report.best_peer(name), row.value(name)
            theirs = peer.value(name) if peer is not None else None
            if peer is not None and mine and theirs:
                found.append(
                    f"{row.contender}, {what}: {factor * mine:.2f} {unit}, best peer {peer.contender} "
                    f"{factor * theirs:.2f} {unit}: {theirs / mine:.3f} times"
                )
        roof, mine = report.roof, row.value("forward_backward_seconds")
        alone = roof.value("forward_backward_seconds") if roof is not None else None
        if mine and alone:
            found.append(
                f"{row.contender}, forward and backward: {100 * alone / mine:.1f}% of the roof, matrix products and "
                f"attention alone in {1e3 * alone:.2f} ms"
            )
    return found


def cause_table(
    row: TrainingRow, other: TrainingRow | None, roof: TrainingRow | None = None
) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each cause): microseconds, share of the step and calls; speed where FLOPs are known; the same
    microseconds of another contender beside them, and of the roof."""
    beside = [one for one in (other, roof) if one is not None]
    document = row.document or {}
    step = 1e6 * (row.value("step_seconds") or 0.0)
    calls: dict[str, float] = {}
    for one in document.get("causes", []):
        calls[one["cause"]] = calls.get(one["cause"], 0.0) + one["calls"]
    header = ["cause", "µs", "% of step", "calls", "TFLOP/s", *(f"{one.contender}, µs" for one in beside)]
    rows = []
    for cause in CAUSES:
        times = [one.cause(cause) for one in (row, *beside)]
        if any(times):
            share = f"{100 * times[0] / step:.1f}" if step else _NOTHING
            speed = _speed(row, cause, times[0])
            rows.append([cause, f"{times[0]:,.0f}", share, f"{calls.get(cause, 0):.0f}", speed, *_columns(times[1:])])
    for name, of in ((_GAPS, _gaps), (_REST, _rest)):
        times = [of(one) for one in (row, *beside)]
        if any(times):
            share = f"{100 * times[0] / step:.1f}" if step else _NOTHING
            rows.append([name, f"{times[0]:,.0f}", share, "", "", *_columns(times[1:])])
    whole = [1e6 * (one.value("step_seconds") or 0.0) for one in beside]
    rows.append(["step", f"{step:,.0f}", "100.0", "", _number(row, "tflop_s_per_gpu", ".0f"), *_columns(whole)])
    return header, rows


def _columns(times: Iterable[float]) -> list[str]:
    return [f"{time:,.0f}" for time in times]


def write_markdown(report: TrainingReport, path: Path) -> None:
    """The page of `markdown`."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        stream.write(markdown(report))


def write_plot(report: TrainingReport, path: Path) -> None:
    """A bar for each contender: milliseconds of a step, split by cause where kernels were traced."""
    from megatron_ru.figures.png import write_stacked_bars

    bars: dict[str, dict[str, float]] = {}
    for row in report.done:
        causes = {cause: row.cause(cause) / 1e3 for cause in CAUSES if row.cause(cause)}
        if causes:
            causes[_GAPS] = _gaps(row) / 1e3
            causes[_REST] = max(0.0, _rest(row) / 1e3)
        bars[row.contender] = causes or {"step": 1e3 * (row.value("step_seconds") or 0.0)}
    write_stacked_bars(path, _what(report), "milliseconds of a step", bars)


def _gaps(row: TrainingRow) -> float:
    """Microseconds of a traced step in which no kernel runs."""
    found = (row.document or {}).get("gap_microseconds") or {}
    return float(sum(time for part, time in found.items() if part != "between steps"))


def _rest(row: TrainingRow) -> float:
    """What kernels and gaps of the traced steps leave of a step that was not traced: a profiler makes longer gaps, and
    the power that they save faster kernels."""
    busy = sum(row.cause(cause) for cause in CAUSES)
    return 1e6 * (row.value("step_seconds") or 0.0) - busy - _gaps(row) if busy else 0.0


def _speed(row: TrainingRow, cause: str, microseconds: float) -> str:
    name = {GEMM: "matmul_flops_per_step", ATTENTION: "attention_flops_per_step"}.get(cause)
    flops = row.value(name) if name else None
    gpus = row.value("gpus") or 1
    return _NOTHING if not flops or not microseconds else f"{flops / gpus / microseconds / 1e6:.0f}"


def _broken_down(report: TrainingReport) -> list[TrainingRow]:
    ours = [row for row in report.done if row.ours and (row.document or {}).get("causes")]
    return ours[-1:] if report.kind == "fused-ladder" else ours


def _beside(report: TrainingReport, row: TrainingRow) -> TrainingRow | None:
    if report.kind == "fused-ladder":
        first = next(iter(report.done), None)
        return first if first is not row else None
    return report.best_peer("step_seconds")


def _what(report: TrainingReport) -> str:
    task = report.task
    return (
        f"{task.variant} cut to {task.layers} layers, sequence {task.sequence}, micro-batch {task.micro_batch}, bf16, "
        f"{task.steps} steps, {report.device_name}"
    )


def _notes(report: TrainingReport) -> list[str]:
    return [f"{row.contender} {row.status}: {row.note}" for row in report.rows if row.status != "ok"]


def _formulas(report: TrainingReport) -> str:
    document: dict[str, object] = next((row.document for row in report.done if row.document), {})
    flops, peak = document.get("flops_per_step"), document.get("peak_tflop_s")
    numbers = f" = {float(str(flops)):.4g} FLOPs a step" if flops else ""
    limit = f", peak {peak:g} TFLOP/s" if isinstance(peak, int | float) else ", peak unknown: no MFU"
    return f"FLOPs = {FORMULA}{numbers}; {MFU_FORMULA}{limit}; medians, times on the device"


def _versions(report: TrainingReport) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in report.done:
        document = row.document or {}
        found |= {"torch": str(document.get("torch", ""))}
        found |= {name: str(value) for name, value in document.get("versions", {}).items() if name != "torch"}
    return found


def _milliseconds(row: TrainingRow, name: str) -> str:
    value = row.value(name)
    return _NOTHING if value is None else f"{1e3 * value:.2f}"


def _percent(row: TrainingRow, name: str) -> str:
    value = row.value(name)
    return _NOTHING if value is None else f"{100 * value:.1f}"


def _number(row: TrainingRow, name: str, form: str) -> str:
    value = row.value(name)
    return _NOTHING if value is None else format(value, form)


def _losses(row: TrainingRow) -> str:
    first, last = row.value("first_loss"), row.value("last_loss")
    return _NOTHING if first is None or last is None else f"{first:.2f}→{last:.2f}"


def _ratio(slower: TrainingRow | None, faster: TrainingRow | None, name: str) -> str:
    one, other = _of_token(slower, name), _of_token(faster, name)
    return f"{one / other:.2f}" if one and other else _NOTHING


def _of_token(row: TrainingRow | None, name: str) -> float | None:
    """Seconds for each token: on more GPUs a step has more of them."""
    seconds = row.value(name) if row is not None else None
    return None if row is None or seconds is None else seconds / (row.value("tokens_per_step") or 1.0)


def _markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
