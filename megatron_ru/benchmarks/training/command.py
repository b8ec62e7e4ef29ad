"""The actions `train` and `fused-ladder` of `megatron-ru bench`. Nothing here needs torch before it is run."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ru.benchmarks.interruption import Interruption
from megatron_ru.benchmarks.training.contender import (
    DEFAULT_FLAGS,
    OURS,
    Contender,
    named_settings,
    our_contender,
    peer_contender,
)
from megatron_ru.benchmarks.training.contest import Start, run
from megatron_ru.benchmarks.training.ladder import RUNGS
from megatron_ru.benchmarks.training.report import summary, write_markdown, write_plot
from megatron_ru.benchmarks.training.result import TrainingReport, read_json, write_json
from megatron_ru.benchmarks.training.task import Task, check_llama
from megatron_ru.foundation.errors import UserError

_DEFAULTS: dict[str, Any] = {
    "variant": "ru_7b3", "layers": 8, "sequence": 4096, "micro_batch": 2, "steps": 20, "flags": DEFAULT_FLAGS,
    "against": "hf,liger,compile,mcore,te,roof", "seconds": 300,
}  # fmt: skip


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `bench train`."""
    parser.add_argument(
        "--against", metavar="PEER,...", default=_DEFAULTS["against"],
        help="hf, liger, compile, mcore, te, roof, or none (default: %(default)s); who cannot run here is told why",
    )  # fmt: skip
    parser.add_argument(
        "--also",
        metavar="NAME=FLAGS",
        action="append",
        default=[],
        help="measure our entry once more under this name, with these flags in the place of --flags; NAME@2=FLAGS on "
        "two GPUs; may be repeated",
    )
    _add_common(parser)


def add_ladder_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `bench fused-ladder`."""
    _add_common(parser)


def run_train(arguments: argparse.Namespace, start: Start, environment: Mapping[str, str]) -> int:
    """Train one shape with our entry and with others, each in a process of its own, and print them side by side."""
    return _run(arguments, "train", start, environment)


def run_ladder(arguments: argparse.Namespace, start: Start, environment: Mapping[str, str]) -> int:
    """Train one shape from plain PyTorch to all fused ops, one op more on each rung, and print the gains."""
    return _run(arguments, "fused-ladder", start, environment)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", default=_DEFAULTS["variant"], help="architecture (default: %(default)s)")
    for name, text in (
        ("layers", "how many of its layers"), ("sequence", "tokens of a sequence"),
        ("micro-batch", "sequences of a step"), ("steps", "steps of each contender, the last three of them traced"),
    ):  # fmt: skip
        default = _DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    parser.add_argument(
        "--flags", default=_DEFAULTS["flags"], help="further flags of pretrain_gpt for ours (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=_DEFAULTS["seconds"], metavar="S",
        help="after which a contender's process is ended (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and single results there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, after each contender")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as a page")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write bars of a step by cause")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: print and draw what --json has written"
    )


def _run(arguments: argparse.Namespace, kind: str, start: Start, environment: Mapping[str, str]) -> int:
    if arguments.plot is not None and arguments.from_json is not None:
        _require_matplotlib()
    if arguments.from_json is not None:
        _finish(arguments, read_json(arguments.from_json), last=True)
        return 0
    from megatron_ru.benchmarks.training.random_tokens import write_random_tokens

    task = Task(
        variant=arguments.variant, layers=arguments.layers, sequence=arguments.sequence,
        micro_batch=arguments.micro_batch, steps=arguments.steps, device=arguments.device or _device(),
    )  # fmt: skip
    choose = _ladder if kind == "fused-ladder" else _contenders
    with ExitStack() as open_things:
        folder = arguments.logs or Path(open_things.enter_context(tempfile.TemporaryDirectory()))
        dataset = folder.resolve() / "random_tokens"
        contenders = choose(arguments, task, dataset)
        write_random_tokens(dataset, task)
        interruption = open_things.enter_context(Interruption())
        report = run(
            kind, task, contenders, start, folder, environment, _command(arguments, kind),
            partial(_finish, arguments, last=False),
        )  # fmt: skip
        _finish(arguments, report, last=True)
    if interruption.number is not None:
        return 128 + interruption.number
    return 0 if any(row.status == "ok" for row in report.rows) else 1


def _contenders(arguments: argparse.Namespace, task: Task, dataset: Path) -> list[Contender]:
    also = named_settings(arguments.also)
    names = [word.strip() for word in arguments.against.split(",") if word.strip()]
    peers = [] if names == ["none"] else names
    known = _DEFAULTS["against"].split(",")
    for name in peers:
        if name not in known:
            raise UserError(f"--against names {name}; expected none or some of {','.join(known)}")
    if peers:
        check_llama(task.architecture())
    ours = [our_contender(task, OURS, shlex.split(arguments.flags), dataset)]
    ours += [our_contender(task, name, flags, dataset, count) for name, (flags, count) in also.items()]
    return [*ours, *(peer_contender(task, name) for name in peers)]


def _ladder(arguments: argparse.Namespace, task: Task, dataset: Path) -> list[Contender]:
    flags = shlex.split(arguments.flags)
    return [our_contender(task, name, [*flags, *rung], dataset) for name, rung in RUNGS.items()]


def _finish(arguments: argparse.Namespace, report: TrainingReport, *, last: bool) -> None:
    if arguments.json is not None:
        write_json(report, arguments.json)
    if arguments.markdown is not None:
        write_markdown(report, arguments.markdown)
    measured = [row for row in report.rows if row.status != "missing"]
    if not last:
        row = measured[-1]
        print(f"{row.contender}: {row.note or f'{row.wall_seconds:.0f} s'}", file=sys.stderr, flush=True)
        return
    print(summary(report), flush=True)
    if arguments.plot is not None and report.done:
        try:
            _require_matplotlib()
        except UserError as error:
            # What was measured is not lost for want of a drawing.
            print(f"megatron-ru: {error}; draw it elsewhere with --from-json", file=sys.stderr)
            return
        write_plot(report, arguments.plot)


def _require_matplotlib() -> None:
    from megatron_ru.figures.png import require_matplotlib

    # Not beside the plot, where results are committed.
    require_matplotlib(Path(tempfile.gettempdir()) / f"megatron-ru-matplotlib-{os.getuid()}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _command(arguments: argparse.Namespace, kind: str) -> str:
    """The command with what differs from the defaults, and of files their names alone."""
    words = ["megatron-ru", "bench", kind]
    for name, value in vars(arguments).items():
        if name in ("command", "action", "logs", "seconds") or value in (None, []) or value == _DEFAULTS.get(name):
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", one.name if isinstance(one, Path) else str(one)]
    return shlex.join(word.replace(f"{os.getcwd()}/", "") for word in words)
