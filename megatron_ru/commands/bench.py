"""Measure our fused ops beside torch's and other libraries', in the same process.

    megatron-ru bench ops                                       everything on the GPU, against all that is installed
    megatron-ru bench ops --only rms_norm,rope --tokens 8192    some ops, some sizes
    megatron-ru bench ops --device cpu                          the smallest size of each op on the processor
    megatron-ru bench ops --against torch,liger --json ops.json --markdown ops.md --plot ops.png

A large copy is timed first. Each op and each contender is then timed forward, backward and together, its results are
compared with the formula in float64, and its speed is told as a share of that copy's. A run that SIGINT or SIGTERM
cuts short ends with what it has, and says which cases are missing.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

NAME = "bench"
SUMMARY = "time the fused ops against a copy of memory and against other libraries"
_DEFAULTS: dict[str, Any] = {"timing": "queued", "seconds_per_case": 0.15}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action `ops`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ops = actions.add_parser("ops", help="the fused ops of one process", description=_ops.__doc__)
    ops.add_argument("--only", metavar="OP,...", help="names of ops (default: all)")
    ops.add_argument(
        "--against", metavar="PEER,...",
        help="torch, compile, liger, te, apex, quack, or none (default: all of them, on a CPU torch)",
    )  # fmt: skip
    ops.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    ops.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"),
        help="of inputs and outputs (default: that of each case, mostly bf16; on a CPU fp32)",
    )  # fmt: skip
    ops.add_argument("--tokens", metavar="N,...", help="cases whose first size is one of these (default: all)")
    ops.add_argument("--hidden", metavar="N,...", help="cases with one of these among their other sizes (default: all)")
    ops.add_argument(
        "--timing", choices=("queued", "graph", "launched"), default=_DEFAULTS["timing"],
        help="on a GPU: calls that wait in its queue, replays of a CUDA graph, or calls as the host makes them "
        "(default: %(default)s)",
    )  # fmt: skip
    ops.add_argument(
        "--seconds-per-case", type=float, default=_DEFAULTS["seconds_per_case"], metavar="S",
        help="for timing each contender in each case; warm-up and compiling come on top (default: %(default)s)",
    )  # fmt: skip
    ops.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, after each case")
    ops.add_argument("--markdown", type=Path, metavar="FILE", help="write tables of all contenders")
    ops.add_argument("--plot", type=Path, metavar="FILE.png", help="write bars of the percent of a copy's speed")


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0, or 128 and the number of the signal that ended it early; raises UserError."""
    return {"ops": _ops}[arguments.action](arguments)


def _ops(arguments: argparse.Namespace) -> int:
    """Time the fused ops and print ours beside the fastest peer."""
    import torch

    from megatron_ru.benchmarks.interruption import Interruption
    from megatron_ru.benchmarks.op_benchmark import Settings
    from megatron_ru.benchmarks.op_benchmark import run as run_benchmark
    from megatron_ru.benchmarks.peer import PEERS
    from megatron_ru.benchmarks.report import summary, write_json, write_markdown, write_plot
    from megatron_ru.benchmarks.result import Report
    from megatron_ru.figures.png import require_matplotlib

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    against = _words(arguments.against)
    if arguments.against is None:
        against = tuple(PEERS) if device == "cuda" else ("torch",)
    elif against == ("none",):
        against = ()
    settings = Settings(
        only=_words(arguments.only),
        against=against,
        device=device,
        dtype=arguments.dtype,
        tokens=_numbers(arguments.tokens, "--tokens"),
        hidden=_numbers(arguments.hidden, "--hidden"),
        timing=arguments.timing,
        seconds=arguments.seconds_per_case,
    )
    if arguments.plot is not None:
        # Minutes of measuring must not end in a missing library.
        require_matplotlib(arguments.plot.parent / ".matplotlib")

    def finished(report: Report) -> None:
        if arguments.json is not None:
            write_json(report, arguments.json)
        if arguments.markdown is not None:
            write_markdown(report, arguments.markdown)

    with Interruption() as interruption:
        report = run_benchmark(settings, finished, _command(arguments), lambda: interruption.came)
        # Once more: the signal may have come in the middle of a case.
        finished(report)
        print(summary(report), flush=True)
        if arguments.plot is not None and report.rows:
            write_plot(report, arguments.plot)
    return 0 if interruption.number is None else 128 + interruption.number


def _command(arguments: argparse.Namespace) -> str:
    """The command with what differs from the defaults, and of files their names: where they lie is nobody's concern."""
    words = ["megatron-ru", NAME, arguments.action]
    for name in (
        "only", "against", "device", "dtype", "tokens", "hidden", "timing", "seconds_per_case", "json", "markdown",
        "plot",
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value != _DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _numbers(text: str | None, flag: str) -> tuple[int, ...]:
    from megatron_ru.foundation.errors import UserError

    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{flag} {text!r} holds something else than whole numbers: give them as 8192,16384")
    return tuple(int(word) for word in words)
