"""Figures as PNG files, by matplotlib."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ru.figures.series import Series
from megatron_ru.foundation.extras import require
from megatron_ru.foundation.files import atomic_output


def require_matplotlib(settings_folder: Path) -> None:
    """Raises `UserError` with the pip command when matplotlib is missing; its caches go into `settings_folder`."""
    os.environ.setdefault("MPLCONFIGDIR", str(settings_folder.resolve()))
    # Importing it would create that folder at once.
    if importlib.util.find_spec("matplotlib") is None:
        require("matplotlib", "drawing figures", "demo")


def write_curves(
    path: Path, title: str, lines: Sequence[Series], points: Sequence[Series] = (), smooth: Sequence[Series] = ()
) -> None:
    """Writes curves of a loss over steps: `lines` thin, `smooth` bold in the same colours, `points` with marks."""
    figure, axes = _figure(title)
    for index, one in enumerate(lines):
        faint = 0.35 if smooth else 1.0
        axes.plot(one.x, one.y, linewidth=1, color=f"C{index}", alpha=faint, label=None if smooth else one.name)
    for index, one in enumerate(smooth):
        axes.plot(one.x, one.y, linewidth=1.8, color=f"C{index}", label=one.name)
    for index, one in enumerate(points, start=len(lines)):
        axes.plot(one.x, one.y, linewidth=1.4, marker="o", markersize=4, color=f"C{index}", label=one.name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


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
    with atomic_output(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    plt.close(figure)
