"""What `megatron-ru bench restart` shows: a table, JSON, and bars."""

import json
from pathlib import Path
from typing import Any

from megatron_ru.benchmarks.restart import Results
from megatron_ru.benchmarks.restart_case import KINDS
from megatron_ru.figures.png import write_bars_from_zero
from megatron_ru.figures.text_table import text_table
from megatron_ru.foundation.files import atomic_output

_PARTS = ("imports", "process_group", "build", "load", "datasets", "first_step", "other")
_STARTS = ("fresh", "checkpoint")


def progress(results: Results) -> str:
    """One line about the last start."""
    case = results.cases[-1]
    parts = ", ".join(f"{part.replace('_', ' ')} {case['parts'][f'{part}_seconds']:.1f}" for part in _PARTS)
    return f"{case['kind']}, {case['start']}: {case['parts']['total_seconds']:.1f} s ({parts})"


def summary(results: Results) -> str:
    """A table of all ways, and the sentences that they are measured for."""
    size, settings = results.settings.size, results.settings
    header = ("way", "start", "first step, s", "imports", "build", "load", "first step", "CPU, GB", "CPU s", "GPU, GB")
    rows = []
    for start in _STARTS:
        for kind in settings.kinds:
            case = results.case(kind, start)
            if case is None:
                continue
            parts = case["parts"]
            seconds = [parts[f"{part}_seconds"] for part in ("total", "imports", "build", "load", "first_step")]
            rows.append((
                kind, start, *(f"{value:.1f}" for value in seconds), _gigabytes(case, "cpu_bytes"),
                f"{case['cpu_seconds']:.0f}", _gigabytes(case, "gpu_bytes"),
            ))  # fmt: skip
    machine = results.machine
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}"
    lines = [
        f"{size.parameters / 1e9:.2f}e9 parameters ({size.layers} layers, hidden {size.hidden}), optimizer "
        f"{settings.optimizer}, {where}, torch {machine['torch']}, megatron-core {machine['megatron_core']}",
        "",
        text_table(header, rows, right=range(2, len(header))),
        "",
        *(f"{kind}: {KINDS[kind]}" for kind in settings.kinds),
        "",
        *_sentences(results),
    ]
    return "\n".join(lines)


def _sentences(results: Results) -> list[str]:
    lines = []
    for kind in results.settings.kinds:
        for start in _STARTS:
            seconds = results.ratio(kind, start, lambda case: float(case["parts"]["total_seconds"]))
            memory = results.ratio(kind, start, lambda case: float(case["stepped"]["cpu_bytes"]))
            if kind != "meta" and seconds is not None and memory is not None:
                lines.append(f"{start}: meta is {seconds:.2f} times as fast as {kind}, with {memory:.2f} times less "
                             "CPU memory")  # fmt: skip
    read, ratio = results.read, results.load_ratio
    if read is not None:
        lines.append(
            f"page cache to {results.settings.device}: {read['bytes'] / 1e9:.2f} GB in {read['seconds']:.2f} s (by "
            f"threads {read['threads_seconds']:.2f}, by torch {read['torch_seconds']:.2f})"
        )
    if ratio is not None:
        lines.append(f"meta loads its checkpoint in {ratio:.2f} times that time")
    return lines


def write_json(results: Results, path: Path) -> None:
    """Everything measured so far."""
    with atomic_output(path, "w", encoding="utf-8") as stream:
        json.dump(results.json(), stream, indent=1)


def write_plot(results: Results, path: Path) -> None:
    """Bars of the seconds to the first step and of the peaks of memory."""
    panels: dict[str, dict[str, float]] = {"seconds to the first step": {}, "peak CPU memory, GB": {}}
    if results.machine["gpu"]:
        panels["peak GPU memory, GB"] = {}
    for start in _STARTS:
        for kind in results.settings.kinds:
            case = results.case(kind, start)
            if case is None:
                continue
            values = (case["parts"]["total_seconds"], case["stepped"]["cpu_bytes"] / 1e9,
                      case["stepped"]["gpu_bytes"] / 1e9)  # fmt: skip
            for panel, value in zip(panels.values(), values, strict=False):
                panel[f"{kind}, {start}"] = value
    size = results.settings.size
    write_bars_from_zero(path, f"{size.name}: {size.parameters / 1e9:.2f}e9 parameters", panels)


def _gigabytes(case: dict[str, Any], name: str) -> str:
    value = case["stepped"][name]
    return f"{value / 1e9:.2f}" if value else "–"
