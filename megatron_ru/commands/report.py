"""Draw what a run wrote with --ru-metrics (and --ru-profile) as one HTML page that needs nothing else, and PNGs.

    megatron-ru report runs/demo                             runs/demo/report.html and runs/demo/figures/*.png
    megatron-ru report runs/demo/metrics.jsonl --output a.html --figures figures

Losses, learning rate, gradient norm, tokens a second, MFU, memory, skipped steps and NaNs over the steps; starts,
evaluations and the kernels of a profiled step as tables. A run that is still training can be looked at.
"""

import argparse
import os
import tempfile
from pathlib import Path

NAME = "report"
SUMMARY = "draw the metrics of a run as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the place of the run and those of the outputs."""
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a folder with metrics below it, or a metrics file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="for the PNGs (default: figures beside the page)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and returns 0; raises `UserError` where there is nothing to draw."""
    from megatron_ru.experiments.run_report.page import summary, write_page
    from megatron_ru.experiments.run_report.records import find_metrics, find_profiles, read_records
    from megatron_ru.figures.png import require_matplotlib
    from megatron_ru.foundation.errors import UserError

    place: Path = arguments.run
    files = find_metrics(place)
    folder = place if place.is_dir() else place.parent
    output = arguments.output or folder / "report.html"
    figures = arguments.figures or output.parent / "figures"
    # The folder of a run holds the run alone.
    require_matplotlib(Path(tempfile.gettempdir()) / f"megatron-ru-matplotlib-{os.getuid()}")
    runs = [read_records(path, str(path.relative_to(folder))) for path in files]
    runs = [one for one in runs if one.steps or one.evaluations]
    if not runs:
        raise UserError(f"{place} has metrics without a step yet: wait for the first logged step")
    pictures = write_page(output, f"Run {folder.resolve().name}", runs, find_profiles(place), figures)
    for one in runs:
        print(one.name)
        for what, value in summary(one):
            print(f"  {what}: {value}")
    print(f"{output} and {len(pictures)} figures in {figures}")
    return 0
