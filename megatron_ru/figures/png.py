"""Figures as PNG files, by matplotlib."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ru.figures.series import Series
from megatron_ru.foundation.extras import require
from megatron_ru.foundation.files import requested_output


def require_matplotlib(settings_folder: Path) -> None:
    """Raises `UserError` with the pip command when matplotlib is missing; its caches go into `settings_folder`."""
    os.environ.setdefault("MPLCONFIGDIR", str(settings_folder.resolve()))
    # Importing it would create that folder at once.
    if importlib.util.find_spec("matplotlib") is None:
        require("matplotlib", "drawing figures", "demo")


def write_curves(
    path: Path,
    title: str,
    lines: Sequence[Series],
    points: Sequence[Series] = (),
    smooth: Sequence[Series] = (),
    *,
    label: str = "loss",
) -> None:
    """Writes curves over steps: `lines` thin, `smooth` bold in the same colours, `points` with marks; `label` says what
    goes upwards."""
    figure, axes = _figure(title)
    for index, one in enumerate(lines):
        faint = 0.35 if smooth else 1.0
        axes.plot(one.x, one.y, linewidth=1, color=f"C{index}", alpha=faint, label=None if smooth else one.name)
    for index, one in enumerate(smooth):
        axes.plot(one.x, one.y, linewidth=1.8, color=f"C{index}", label=one.name)
    for index, one in enumerate(points, start=len(lines)):
        axes.plot(one.x, one.y, linewidth=1.4, marker="o", markersize=4, color=f"C{index}", label=one.name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def write_curve_panels(path: Path, title: str, panels: Mapping[str, Sequence[Series]], x_label: str) -> None:
    """Writes one panel of curves with marks for each name, side by side, over a logarithmic axis of x.

    A name has its colour in all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(one.name for series in panels.values() for one in series))
    ticks = sorted({x for series in panels.values() for one in series for x in one.x})
    figure, drawn = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axes, (name, series) in zip(drawn[0], panels.items(), strict=True):
        for one in series:
            axes.plot(one.x, one.y, marker="o", markersize=4, linewidth=1.4, color=f"C{names.index(one.name)}")
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        [drawn[0][0].plot([], [], marker="o", markersize=4, color=f"C{index}")[0] for index in range(len(names))],
        names, frameon=False, fontsize=8, loc="outside lower center", ncol=min(len(names), 4),
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    with requested_output(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    plt.close(figure)


def write_bars(path: Path, title: str, groups: Mapping[str, Mapping[str, float | None]]) -> None:
    """Writes one panel of horizontal bars for each group, {label: value}; a value of None leaves its place empty.

    The axes begin a little below the smallest value, so that small differences are seen.
    """
    import matplotlib.pyplot as plt

    tallest = max(len(bars) for bars in groups.values())
    figure, panels = plt.subplots(
        1, len(groups), figsize=(5.5 * len(groups), 0.38 * tallest + 1.4), squeeze=False, sharey=True
    )
    for panel, (name, bars) in zip(panels[0], groups.items(), strict=True):
        known = [value for value in bars.values() if value is not None]
        labels = list(bars)
        panel.barh(range(len(labels)), [value or 0.0 for value in bars.values()], color="C0", height=0.65)
        for row, value in enumerate(bars.values()):
            if value is not None:
                panel.text(value, row, f" {value:.3f}", va="center", fontsize=8)
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        if known:
            room = max(max(known) - min(known), 0.01)
            panel.set_xlim(min(known) - 0.3 * room, max(known) + 0.25 * room)
        panel.set_title(name, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def write_bars_from_zero(path: Path, title: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Writes one panel of horizontal bars for each group, {label: value}; the labels are those of the first group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest = max(len(bars) for bars in groups.values())
    size = (5 * len(groups), 0.38 * tallest + 1.4)
    figure, panels = plt.subplots(1, len(groups), figsize=size, squeeze=False, sharey=True)
    for index, (panel, (name, bars)) in enumerate(zip(panels[0], groups.items(), strict=True)):
        places = range(len(bars))
        panel.barh(places, list(bars.values()), color=f"C{index}", height=0.65)
        for row, value in zip(places, bars.values(), strict=True):
            panel.text(value, row, f" {value:.1f}", va="center", fontsize=8)
        panel.set_yticks(places, list(bars), fontsize=8)
        panel.set_xlim(0, 1.15 * max(bars.values(), default=1.0) or 1.0)
        panel.set_title(name, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def write_bars_with_marks(
    path: Path,
    title: str,
    label: str,
    bars: Mapping[str, float],
    marks: Mapping[str, Mapping[str, float]],
    bar_name: str,
) -> None:
    """Writes horizontal bars {row: value} from zero, and on the rows marks in a colour for each name in `marks`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(dict.fromkeys((*bars, *(row for one in marks.values() for row in one))))
    figure, axes = plt.subplots(figsize=(9, 0.26 * len(rows) + 1.6))
    places = {row: place for place, row in enumerate(rows)}
    axes.barh([places[row] for row in bars], list(bars.values()), color="C0", height=0.6, label=bar_name)
    for index, (name, values) in enumerate(marks.items(), start=1):
        heights = [places[row] for row in values]
        axes.scatter(list(values.values()), heights, s=26, color=f"C{index}", label=name, zorder=3)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axis, at the same distance whatever the height.
    below = -0.62 / (0.26 * len(rows) + 0.6)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, below), ncol=3)
    _save(figure, path)


def write_stacked_bars(path: Path, title: str, label: str, bars: Mapping[str, Mapping[str, float]]) -> None:
    """Writes one horizontal bar for each row of {row: {part: value}}, its parts behind each other in the order in which
    they first come, each part in one colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(dict.fromkeys(part for values in bars.values() for part in values))
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(bars) + 2.4))
    colours = matplotlib.colormaps["tab20"]
    places = range(len(bars))
    left = [0.0] * len(bars)
    for index, part in enumerate(parts):
        widths = [values.get(part, 0.0) for values in bars.values()]
        axes.barh(places, widths, left=left, height=0.65, color=colours(index % colours.N), label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end in zip(places, left, strict=True):
        axes.text(end, place, f" {end:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left, default=1.0) or 1.0)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    below = -0.55 / (0.5 * len(bars) + 0.6)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, below), ncol=4)
    _save(figure, path)


def _figure(title: str) -> tuple[Any, Any]:
    import matplotlib

    # No window is ever opened, and none could be on a cluster.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8))
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    with requested_output(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    plt.close(figure)
