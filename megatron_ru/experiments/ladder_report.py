"""Our losses beside the published ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ru.experiments.published import PublishedTable
from megatron_ru.figures.png import write_bars, write_curves
from megatron_ru.figures.series import Series, running_mean
from megatron_ru.figures.text_table import text_table
from megatron_ru.models.variant import find_variant


@dataclass(frozen=True, kw_only=True)
class LadderRun:
    """One trained variant."""

    variant: str
    parameters: int
    first_validation_loss: float
    """Before the first step."""
    validation_loss: float
    """After the last step, on the same samples."""
    step_seconds: float
    train_losses: list[float]


def table_text(table: PublishedTable, runs: Mapping[str, LadderRun]) -> str:
    """The lines of a table with the published loss, ours and what follows, and where the two disagree."""
    header = ["variant", "published", "change", "here", "change", "parameters", "ms/step"]
    rows = []
    for name, loss in table.losses.items():
        run = runs[name]
        parent = _reference(name, table)
        rows.append(
            [
                name,
                "-" if loss is None else f"{loss:.3f}",
                _change(loss, table.losses.get(parent) if parent else None),
                f"{run.validation_loss:.3f}",
                _change(run.validation_loss, runs[parent].validation_loss if parent else None),
                str(run.parameters),
                f"{1000 * run.step_seconds:.0f}",
            ]
        )
    lines = [text_table(header, rows, right={1, 2, 3, 4, 5, 6}), "", _agreement(table, runs)]
    if table.note:
        lines.append(table.note)
    return "\n".join(lines)


def inversions(table: PublishedTable, runs: Mapping[str, LadderRun]) -> list[tuple[str, str]]:
    """The (better, worse) pairs of the publication whose order is the other way round here."""
    return [
        (better, worse)
        for better, worse in table.order()
        if runs[better].validation_loss >= runs[worse].validation_loss
    ]


def draw_figures(folder: Path, tables: Sequence[PublishedTable], runs: Mapping[str, LadderRun]) -> list[Path]:
    """Writes, for each table, curves of the training loss and bars of both losses; returns the files."""
    written = []
    for table in tables:
        curves = [
            running_mean(Series(name=name, x=tuple(map(float, range(1, len(losses) + 1))), y=tuple(losses)), 10)
            for name in table.losses
            if (losses := runs[name].train_losses)
        ]
        written += [folder / f"{table.name}_curves.png", folder / f"{table.name}_losses.png"]
        write_curves(written[-2], f"{table.title}\ntraining loss, mean of 10 steps", lines=curves)
        groups: dict[str, dict[str, float | None]] = {
            "published": dict(table.losses),
            "here, validation": {name: runs[name].validation_loss for name in table.losses},
        }
        write_bars(written[-1], table.title, groups)
    return written


def _reference(name: str, table: PublishedTable) -> str | None:
    """The line that a change is counted from: the parent if it is in the table, or else the first line."""
    parent = find_variant(name).parent
    if parent in table.losses:
        return parent
    first = next(iter(table.losses))
    return None if name == first or find_variant(name).parent is None else first


def _change(loss: float | None, reference: float | None) -> str:
    return "" if loss is None or reference is None else f"{100 * (loss / reference - 1):+.1f} %"


def _agreement(table: PublishedTable, runs: Mapping[str, LadderRun]) -> str:
    pairs, wrong = table.order(), inversions(table, runs)
    lines = [f"of {len(pairs)} pairs whose order is published, {len(pairs) - len(wrong)} have it here too"]
    shown = sorted(wrong, key=lambda pair: runs[pair[1]].validation_loss - runs[pair[0]].validation_loss)
    for better, worse in shown[:8]:
        gap = runs[better].validation_loss - runs[worse].validation_loss
        lines.append(f"  differs: {better} is published as better than {worse}, here it is worse by {gap:.3f}")
    if len(shown) > 8:
        lines.append(f"  and {len(shown) - 8} more with smaller differences")
    return "\n".join(lines)
