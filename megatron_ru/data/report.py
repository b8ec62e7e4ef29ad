"""One HTML page about a pipeline: what came in, what was dropped and why, and what the datasets are made of."""

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ru.batches.mixture import chi_square
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require
from megatron_ru.foundation.files import requested_output

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 1.4rem } td, th { padding: .2rem .7rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f5f5f5 } .samples td { text-align: left; vertical-align: top; font-size: 13px }
img { max-width: 100% } h2 { margin-top: 2.2rem } code { font-size: 13px }
"""

Row = Sequence[object]


def write_report(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the page of the pipeline in `folder` to `output`, by default `folder`/report.html, and returns its path.

    Everything is in the one file. Raises UserError where there is no manifest, and without matplotlib.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); it is written by megatron-ru data run") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"steps", "config", "inputs", "versions"} <= manifest.keys():
        raise UserError(f"{path} is no manifest of a pipeline; megatron-ru data run writes it again")
    target = Path(folder) / "report.html" if output is None else Path(output)
    with requested_output(target, "w", encoding="utf-8") as stream:
        stream.write(report_page(manifest))
    return target


def report_page(manifest: dict[str, Any]) -> str:
    """The page of a manifest."""
    steps = manifest["steps"]
    parts = [
        f"<h1>Data of {_text(Path(manifest['config']['output']).name)}</h1>",
        "" if manifest["complete"] else "<p><b>This run is not finished.</b></p>",
        "<h2>Steps</h2>", _table(("step", "counts", "dropped"), _step_rows(steps)),
        "<h2>Inputs</h2>",
        _table(("domain", "file", "bytes"), [(e["domain"], e["file"], f"{e['bytes']:,}") for e in manifest["inputs"]]),
    ]  # fmt: skip
    parts += _deduplication(steps) + _lengths(steps) + _fertility(manifest) + _packing(steps) + _mixture(manifest)
    parts += _samples(steps)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))
    parts.append(f"<p><small>{_text(versions)}</small></p>")
    body = "\n".join(part for part in parts if part)
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Data</title><style>{_STYLE}</style>'
    return f"{head}\n{body}\n"


def _step_rows(steps: dict[str, Any]) -> list[Row]:
    def words(found: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(found.items()) if count)

    return [(name, words(step["counts"]), words(step["dropped"])) for name, step in steps.items()]


def _deduplication(steps: dict[str, Any]) -> list[str]:
    read, texts = steps.get("read"), steps.get("texts")
    if read is None or texts is None:
        return []
    names, values = ["documents read"], [read["counts"].get("documents", 0)]
    dropped = dict(texts["dropped"]) | steps.get("semantic_dedup", {}).get("dropped", {})
    for reason, count in dropped.items():
        names.append(reason.replace("_", " "))
        values.append(count)
    names.append("documents kept")
    values.append((steps.get("semantic_dedup") or texts)["counts"].get("documents", 0))
    whole = max(values[0], 1)
    share = [(name, f"{value:,}", f"{value / whole:.2%}") for name, value in zip(names, values, strict=True)]
    parts = ["<h2>What was dropped</h2>", _table(("", "documents", "share"), share), _bars(names, values, "documents")]
    cosines = steps.get("threshold", {}).get("histograms", {}).get("cosine_hundredths")
    if cosines:
        threshold = steps["threshold"]["files"][0]["threshold"]
        keys = sorted(map(int, cosines))
        parts += [
            f"<p>Largest cosine to a document farther from the centroid; from {threshold:.4f} on documents are "
            "dropped.</p>",
            _bars([f"{key / 100:.2f}" for key in keys], [cosines[str(key)] for key in keys], "documents"),
        ]
    return parts


def _lengths(steps: dict[str, Any]) -> list[str]:
    parts = []
    for step, name in (("texts", "characters"), ("tokenise", "tokens")):
        found = steps.get(step, {}).get("histograms", {}).get(name)
        if found:
            keys = sorted(map(int, found))
            labels = [f"< {2**key:,}" for key in keys]
            parts += [f"<h2>Lengths in {name}</h2>", _bars(labels, [found[str(key)] for key in keys], "documents")]
    return parts


def _fertility(manifest: dict[str, Any]) -> list[str]:
    step = manifest["steps"].get("tokenise")
    if step is None:
        return []
    counts = step["counts"]
    rows: list[Row] = []
    for entry in manifest["config"]["inputs"]:
        domain = entry["domain"]
        if not (tokens := counts.get(f"tokens_{domain}", 0)):
            continue
        characters, words, size = (counts.get(f"{name}_{domain}", 0) for name in ("characters", "words", "bytes"))
        ratios = (characters / tokens, tokens / max(words, 1), size / tokens)
        rows.append((domain, f"{tokens:,}", *(f"{ratio:.3f}" for ratio in ratios)))
    heads = ("domain", "tokens", "characters per token", "tokens per word", "bytes per token")
    names, values = [str(row[0]) for row in rows], [float(str(row[2])) for row in rows]
    return ["<h2>Fertility</h2>", _table(heads, rows), _bars(names, values, heads[2])]


def _packing(steps: dict[str, Any]) -> list[str]:
    if "pack" not in steps:
        return []
    counts = steps["pack"]["counts"]
    total = counts.get("tokens", 0) + counts.get("padding_tokens", 0)
    rows: list[Row] = [
        (name.replace("_", " "), f"{counts.get(name, 0):,}")
        for name in ("documents", "pieces", "blocks", "tokens", "padding_tokens", "hard_cuts")
    ]
    rows.append(("padding", f"{counts.get('padding_tokens', 0) / max(total, 1):.3%}"))
    return ["<h2>Packing</h2>", _table(("", ""), rows)]


def _mixture(manifest: dict[str, Any]) -> list[str]:
    import numpy as np

    steps = manifest["steps"]
    if "mixture" not in steps:
        return []
    counts, blocks = steps["mixture"]["counts"], steps["pack"]["counts"]
    domains = [entry["domain"] for entry in manifest["config"]["inputs"]]
    sizes = [blocks.get(f"blocks_{domain}_train", 0) for domain in domains]
    weights = [
        size if entry["weight"] is None else entry["weight"]
        for entry, size in zip(manifest["config"]["inputs"], sizes, strict=True)
    ]
    drawn = [counts.get(f"samples_{domain}", 0) for domain in domains]
    wanted = [weight / sum(weights) for weight in weights]
    rows = [
        (domain, f"{want:.4f}", f"{got / max(sum(drawn), 1):.4f}", f"{got:,}", f"{got / max(size, 1):.2f}")
        for domain, want, got, size in zip(domains, wanted, drawn, sizes, strict=True)
    ]
    statistic, freedom = chi_square(np.array(drawn), tuple(map(float, weights)))
    return [
        "<h2>Mixture: drawn against wanted</h2>",
        _table(("domain", "wanted", "drawn", "samples", "epochs"), rows),
        f"<p>χ² = {statistic:.2f} with {freedom} degrees of freedom.</p>",
        _bars(domains, [got / max(sum(drawn), 1) for got in drawn], "share", beside=wanted),
    ]


def _samples(steps: dict[str, Any]) -> list[str]:
    parts = []
    for name, step in steps.items():
        if step["samples"]:
            rows = [(s["reason"].replace("_", " "), s["place"], s["text"]) for s in step["samples"]]
            parts += [f"<h2>Dropped by {_text(name)}, some of it</h2>",
                      _table(("reason", "place", "text"), rows, "samples")]  # fmt: skip
    return parts


def _table(heads: Sequence[str], rows: Sequence[Row], kind: str = "") -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    lines = ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<table class="{kind}"><tr>{head}</tr>\n' + "\n".join(lines) + "</table>"


def _bars(names: Sequence[str], values: Sequence[float], unit: str, beside: Sequence[float] = ()) -> str:
    """A picture within the page: a bar for each value, and a mark for each of `beside`."""
    require("matplotlib", "the report's plots", "demo")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(values)), values, color="#4a7db5", label="drawn")
    if beside:
        axes.plot(range(len(beside)), beside, "_", color="#c0392b", markersize=26, markeredgewidth=2, label="wanted")
        axes.legend(frameon=False)
    # No more names than can be read.
    every = slice(None, None, len(names) // 25 + 1)
    axes.set_xticks(range(len(names))[every], names[every], rotation=35 if len(names) > 6 else 0, fontsize=8)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return f'<img alt="{_text(unit)}" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def _text(value: object) -> str:
    return html.escape(str(value))
