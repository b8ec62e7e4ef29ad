"""One HTML page of a run: figures inside it as PNG, tables, no network."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ru.experiments.run_report.records import Records
from megatron_ru.figures.png import write_curves
from megatron_ru.figures.series import Series, running_mean
from megatron_ru.foundation.files import atomic_output

_STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; color: #222; }
figure { display: inline-block; margin: 0 1em 1em 0; } img { width: 36em; max-width: 100%; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } caption { text-align: left; font-weight: bold; }
""".strip()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure."""

    name: str
    """Of its file."""
    title: str
    label: str
    lines: tuple[Series, ...]
    points: tuple[Series, ...] = ()
    smooth: tuple[Series, ...] = ()


def panels(records: Records) -> list[Panel]:
    """A figure for everything that the run told; what it did not tell has none."""
    losses = [records.series(name) for name in records.losses()]
    evaluated = [
        Series(name=name, x=tuple(map(float, sorted(found))), y=tuple(found[step] for step in sorted(found)))
        for name, found in records.evaluations.items()
    ]
    window = max(1, len(records.steps) // 50)
    smooth = [running_mean(_finite(one), window) for one in losses] if window > 1 else []
    counters = [records.total(key) for key in ("skipped", "nan_gradients", "nan_losses")]
    found = [
        Panel(name="loss", title="Loss", label="loss", lines=tuple(losses), points=tuple(evaluated),
              smooth=tuple(smooth)),
        Panel(name="learning_rate", title="Learning rate", label="learning rate",
              lines=(records.series("learning_rate", "learning rate"),)),
        Panel(name="gradient_norm", title="Gradient norm", label="norm before clipping",
              lines=(records.series("gradient_norm", "gradient norm"),)),
        Panel(name="tokens_per_second", title="Speed", label="tokens a second, all GPUs",
              lines=(records.series("tokens_per_second", "tokens/s"),)),
        Panel(name="mfu", title="Model FLOPs utilisation", label="MFU, %",
              lines=(records.series("mfu", "MFU", 100.0),)),
        Panel(name="tflop_s_per_gpu", title="TFLOP/s of each GPU", label="TFLOP/s",
              lines=(records.series("tflop_s_per_gpu", "TFLOP/s"),)),
        Panel(name="step_seconds", title="Time of a step, with what lies between", label="seconds",
              lines=(records.step_seconds(),)),
        Panel(name="peak_memory", title="Peak memory of the last rank's GPU", label="GiB",
              lines=(records.series("peak_memory_gib", "peak memory"),)),
        Panel(name="counters", title="Skipped steps and NaNs until then", label="count",
              lines=tuple(one for one in counters if one.y and one.y[-1])),
    ]  # fmt: skip
    kept = []
    for panel in found:
        lines = tuple(one for one in map(_finite, panel.lines) if one.x)
        points = tuple(one for one in map(_finite, panel.points) if one.x)
        if lines or points:
            kept.append(
                Panel(name=panel.name, title=panel.title, label=panel.label, lines=lines, points=points,
                      smooth=panel.smooth)
            )  # fmt: skip
    return kept


def write_page(
    path: Path, title: str, runs: Sequence[Records], profiles: dict[str, dict[str, Any]], figures: Path
) -> list[Path]:
    """Writes the page and, in `figures`, its PNGs, whose paths are returned."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    written = []
    for number, records in enumerate(runs):
        prefix = f"{number + 1}_" if len(runs) > 1 else ""
        parts += [f"<h2>{html.escape(records.name)}</h2>", *_tables(records)]
        for panel in panels(records):
            picture = figures / f"{prefix}{panel.name}.png"
            write_curves(picture, panel.title, panel.lines, panel.points, panel.smooth, label=panel.label)
            written.append(picture)
            parts.append(_figure(panel.title, picture.read_bytes()))
    parts += [_profile(name, document) for name, document in profiles.items()]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>\n{_STYLE}\n</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with atomic_output(path, "w", encoding="utf-8") as stream:
        stream.write(page)
    return written


def summary(records: Records) -> list[tuple[str, str]]:
    """(what, value) of a whole run."""
    steps = sorted(records.steps)
    found = [("logged steps", f"{len(steps)}, from {steps[0]} to {steps[-1]}" if steps else "0")]
    for name in records.losses():
        values = records.series(name).y
        found.append((name, f"{values[0]:.4f} → {values[-1]:.4f}"))
    for name, values_by_step in records.evaluations.items():
        best = min(values_by_step, key=lambda step: values_by_step[step])
        last = max(values_by_step)
        found.append((name, f"{values_by_step[last]:.4f} at {last}; best {values_by_step[best]:.4f} at {best}"))
    for key, what, form, factor in (
        ("tokens_per_second", "tokens/s, median", ",.0f", 1), ("tflop_s_per_gpu", "TFLOP/s/GPU, median", ".4g", 1),
        ("mfu", "MFU %, median", ".1f", 100),
    ):  # fmt: skip
        value = records.median(key)
        if value is not None:
            found.append((what, format(factor * value, form)))
    peaks = records.series("peak_memory_gib").y
    if peaks:
        found.append(("peak memory, GiB", f"{max(peaks):.1f}"))
    for key, what in (("skipped", "skipped steps"), ("nan_gradients", "gradient tensors with a NaN"),
                      ("nan_losses", "losses that were none")):  # fmt: skip
        total = records.total(key).y
        # Whether NaNs are counted is not told: none that was counted is no news.
        if total and (total[-1] or key == "skipped"):
            found.append((what, f"{total[-1]:.0f}"))
    if records.repeated:
        found.append(("steps made again after a restart", str(records.repeated)))
    if records.damaged:
        found.append(("lines that could not be read", str(records.damaged)))
    return found


def _tables(records: Records) -> list[str]:
    parts = [_table("Run", ("", ""), summary(records))]
    if records.startups:
        names = list(dict.fromkeys(name for _, seconds in records.startups for name in seconds))
        rows = [[str(step), *(f"{seconds.get(name, 0.0):.1f}" for name in names)] for step, seconds in records.startups]
        header = ["first step", *(name.removesuffix("_seconds").replace("_", " ") for name in names)]
        parts.append(_table("Starts, seconds", header, rows))
    if records.evaluations:
        header = ["step", *records.evaluations]
        steps = sorted({step for found in records.evaluations.values() for step in found})[-20:]
        rows = [[str(s), *(_loss(found.get(s)) for found in records.evaluations.values())] for s in steps]
        parts.append(_table("Evaluations, the last 20", header, rows))
    if records.events:
        parts.append(_table("Events", ("step", "what"), [(str(step), what) for step, what in records.events]))
    return parts


def _profile(name: str, document: dict[str, Any]) -> str:
    step = 1e6 * document["step_seconds"]
    rows = [
        [one["cause"], one["part"], f"{one['microseconds']:,.0f}", f"{100 * one['microseconds'] / step:.1f}",
         f"{one['calls']:.0f}"]
        for one in document["causes"]
    ]  # fmt: skip
    rows.append(["step", "", f"{step:,.0f}", "100.0", ""])
    caption = f"{name}: a step by cause, {document.get('device_name', '')}"
    return _table(caption, ("cause", "part", "µs", "% of step", "calls"), rows)


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption>\n<tr>{head}</tr>\n{body}\n</table>"


def _figure(title: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>'


def _finite(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    return Series(name=series.name, x=tuple(x for x, _ in kept), y=tuple(y for _, y in kept))


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
