"""The actions of `megatron-ru data` that run a pipeline: run, dedup, report."""

import argparse
import os
import sys
from typing import Any

EXECUTORS = ("local", "datatrove", "slurm")


def add_actions(actions: Any, workers: int) -> None:
    """Adds the actions to the subparsers of `megatron-ru data`."""
    run = actions.add_parser("run", help="a whole pipeline, from text to datasets", description=_run.__doc__)
    run.add_argument("config", metavar="CONFIG", help="a YAML or JSON file of the pipeline's fields")
    run.add_argument("--until", metavar="STEP", help="stop behind this step")
    _add_shared(run, workers)
    run.add_argument(
        "--executor", choices=EXECUTORS, default="local",
        help="worker processes of ours (local), datatrove's on this machine, or jobs of Slurm through datatrove",
    )  # fmt: skip
    run.add_argument("--tasks", type=int, default=8, metavar="N", help="ranks of each step under datatrove and Slurm")
    run.add_argument("--partition", default="", metavar="NAME", help="of Slurm")
    run.add_argument("--time", default="24:00:00", metavar="LIMIT", help="of each Slurm job (default: %(default)s)")

    run.add_argument("--memory", type=int, default=2000, metavar="MB", help="of each rank (default: %(default)s)")

    dedup = actions.add_parser("dedup", help="drop documents with the same text", description=_dedup.__doc__)
    dedup.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines, plain or compressed")
    dedup.add_argument("--output", required=True, metavar="FOLDER", help="gets the shards under steps/texts")
    dedup.add_argument("--text-field", default="text", metavar="NAME", help="default: %(default)s")
    dedup.add_argument("--at-least", type=int, default=0, metavar="N", help="also drop texts below N characters")
    dedup.add_argument("--skip-malformed", action="store_true", help="count lines that are no documents, and go on")
    _add_shared(dedup, workers)

    report = actions.add_parser("report", help="a page about a pipeline", description=_report.__doc__)
    report.add_argument("folder", metavar="DIR", help="the output of a pipeline")
    report.add_argument("--output", metavar="FILE", help="default: DIR/report.html")


def run_action(arguments: argparse.Namespace) -> int:
    """Runs one of the actions. Returns 0; raises UserError."""
    return {"run": _run, "dedup": _dedup, "report": _report}[arguments.action](arguments)


def _add_shared(parser: argparse.ArgumentParser, workers: int) -> None:
    parser.add_argument(
        "--workers", type=int, default=workers, metavar="N",
        help="processes; the output does not depend on it (default: one for each processor)",
    )  # fmt: skip
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None,
        help="a progress bar on stderr (default: when that is a terminal)",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    """Run the steps of a pipeline that are not done: after a stop, the same command goes on where it was."""
    from megatron_ru.data.config_file import load_config

    config = load_config(arguments.config)
    if arguments.executor != "local":
        from megatron_ru.data.datatrove_executor import run_through_datatrove

        said = run_through_datatrove(
            config, slurm=arguments.executor == "slurm", tasks=arguments.tasks, workers=arguments.workers,
            partition=arguments.partition, limit=arguments.time, memory=arguments.memory,
        )  # fmt: skip
        print(said)
        return 0
    return _run_local(config, arguments, arguments.until)


def _dedup(arguments: argparse.Namespace) -> int:
    """Keep the first of documents with the same text. Memory does not grow with the corpus."""
    from megatron_ru.data.config import Input, Length, PipelineConfig

    config = PipelineConfig(
        output=os.path.abspath(arguments.output),
        inputs=(Input(domain="text", files=tuple(map(os.path.abspath, arguments.input))),),
        text_field=arguments.text_field,
        malformed="skip" if arguments.skip_malformed else "stop",
        length=Length(at_least=arguments.at_least) if arguments.at_least else None,
    )
    return _run_local(config, arguments, None)


def _run_local(config: Any, arguments: argparse.Namespace, until: str | None) -> int:
    from megatron_ru.data.pipeline import run_pipeline

    shown = sys.stderr.isatty() if arguments.progress is None else arguments.progress
    with _Bars(shown) as bars:
        manifest = run_pipeline(config, arguments.workers, until, bars.show)
    for name, outcome in manifest["steps"].items():
        print(f"{name}: {_sentence(outcome)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Write one HTML page with the tables and plots of a pipeline."""
    from megatron_ru.data.report import write_report

    print(write_report(arguments.folder, arguments.output))
    return 0


def _sentence(outcome: dict[str, Any]) -> str:
    counts = [f"{count} {name.replace('_', ' ')}" for name, count in sorted(outcome["counts"].items())]
    dropped = [f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(outcome["dropped"].items()) if count]
    return ", ".join(counts) + (f"; dropped: {', '.join(dropped)}" if dropped else "")


class _Bars:
    """A progress bar for each step, with an estimate of the time left."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._name = ""

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, name: str, done: int, tasks: int) -> None:
        from tqdm import tqdm

        if name != self._name:
            if self._bar is not None:
                self._bar.close()
            # What an earlier run did is no part of the estimate.
            self._bar = tqdm(
                total=tasks, initial=done, unit="task", desc=name, disable=not self._shown, file=sys.stderr
            )  # fmt: skip
            self._name = name
        self._bar.update(done - self._bar.n)
