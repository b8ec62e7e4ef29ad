"""Measure our fused ops beside torch's and other libraries', or the start of a training run beside Megatron's own.

    megatron-ru bench ops                                       everything on the GPU, against all that is installed
    megatron-ru bench ops --only rms_norm,rope --tokens 8192    some ops, some sizes
    megatron-ru bench ops --device cpu                          the smallest size of each op on the processor
    megatron-ru bench ops --against torch,liger --json ops.json --markdown ops.md --plot ops.png
    megatron-ru bench train --against hf,liger,compile,mcore    a training step of our entry beside others'
    megatron-ru bench fused-ladder                              a training step with one fused op after the other
    megatron-ru bench tokenise --input ru.jsonl.gz --tokenizer ru_40k --megatron-lm ../Megatron-LM
    megatron-ru bench restart --size 1b --json restart.json --plot restart.png

A large copy is timed first. Each op and each contender is then timed forward, backward and together, its results are
compared with the formula in float64, and its speed is told as a share of that copy's. A run that SIGINT or SIGTERM
cuts short ends with what it has, and says which cases are missing.
"""

import argparse
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "bench"
SUMMARY = "time the fused ops beside other libraries, or starts and restarts of a run"
_DEFAULTS: dict[str, Any] = {"timing": "queued", "seconds_per_case": 0.15}
_RESTART_DEFAULTS: dict[str, Any] = {"size": "tiny", "kinds": "cpu_fp32,device,meta", "repeat": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_restart(actions)
    _add_training(actions)
    _add_tokenise(actions)
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


def _add_restart(actions: Any) -> None:
    from megatron_ru.benchmarks.restart_case import KINDS, OPTIMIZERS, SIZES

    restart = actions.add_parser(
        "restart", help="the time to the first step, fresh and from a checkpoint", description=_restart.__doc__
    )
    restart.add_argument(
        "--size", default=_RESTART_DEFAULTS["size"],
        help=f"{', '.join(SIZES)}, or LAYERSxHIDDENxFEED_FORWARD (default: %(default)s)",
    )  # fmt: skip
    restart.add_argument(
        "--kinds", default=_RESTART_DEFAULTS["kinds"], metavar="KIND,...",
        help="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()) + " (default: %(default)s)",
    )  # fmt: skip
    restart.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS),
        help="adamw is in the checkpoint, 12 bytes for each parameter; none: SGD, and weights alone in the checkpoint "
        "(default: adamw below 5e8 parameters)",
    )  # fmt: skip
    restart.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    restart.add_argument(
        "--repeat", type=int, default=_RESTART_DEFAULTS["repeat"], metavar="N",
        help="starts of each case, of which the fastest counts (default: %(default)s)",
    )  # fmt: skip
    restart.add_argument(
        "--folder", type=Path, metavar="DIR",
        help="where the checkpoint lies meanwhile (default: /dev/shm or the folder for temporary files)",
    )  # fmt: skip
    restart.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, after each start")
    restart.add_argument("--plot", type=Path, metavar="FILE.png", help="write bars of the seconds and of the memory")


def _add_training(actions: Any) -> None:
    from megatron_ru.benchmarks.training import command

    train = actions.add_parser("train", help="a training step beside others'", description=command.run_train.__doc__)
    command.add_train_arguments(train)
    ladder = actions.add_parser(
        "fused-ladder", help="a training step with one fused op after the other", description=command.run_ladder.__doc__
    )
    command.add_ladder_arguments(ladder)


def _add_tokenise(actions: Any) -> None:
    from megatron_ru.benchmarks import tokenise_command

    tokenise = actions.add_parser(
        "tokenise", help="text to token files, beside others", description=tokenise_command.run.__doc__
    )
    tokenise_command.add_arguments(tokenise)


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0, or 128 and the number of the signal that ended it early; raises UserError."""
    from megatron_ru.benchmarks import tokenise_command

    actions = {
        "ops": _ops, "restart": _restart, "train": _training, "fused-ladder": _training,
        "tokenise": tokenise_command.run,
    }  # fmt: skip
    return actions[arguments.action](arguments)


def _training(arguments: argparse.Namespace) -> int:
    from megatron_ru.benchmarks.training import command
    from megatron_ru.experiments.launcher import child_environment
    from megatron_ru.experiments.process import RunFailed, run_logged

    def start(what: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        until = time.monotonic() + arguments.seconds

        def watch() -> None:
            if time.monotonic() > until:
                raise RunFailed(f"{what} was not done after {arguments.seconds:.0f} s; give it more with --seconds")

        run_logged(what, words, log, environment, watch)

    environment = child_environment()
    if "OMP_NUM_THREADS" in os.environ:
        environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    action = command.run_train if arguments.action == "train" else command.run_ladder
    return action(arguments, start, environment)


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


def _restart(arguments: argparse.Namespace) -> int:
    """Start a training run in processes of their own, for each way to build the model, up to the end of its first step:
    fresh, and from a checkpoint that one of them saved; and read the bytes of that checkpoint to the device alone."""
    import torch

    from megatron_ru.benchmarks import restart
    from megatron_ru.benchmarks.interruption import Interruption
    from megatron_ru.benchmarks.restart_case import default_optimizer, find_size
    from megatron_ru.benchmarks.restart_report import progress, summary, write_json, write_plot
    from megatron_ru.figures.png import require_matplotlib
    from megatron_ru.foundation.errors import UserError

    if arguments.repeat < 1:
        raise UserError(f"--repeat {arguments.repeat} was given, expected 1 or more")
    size = find_size(arguments.size)
    settings = restart.Settings(
        size=size,
        kinds=_words(arguments.kinds),
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        optimizer=arguments.optimizer or default_optimizer(size),
        repeat=arguments.repeat,
        folder=arguments.folder,
    )
    if arguments.plot is not None:
        require_matplotlib(arguments.plot.parent / ".matplotlib")

    def finished(results: restart.Results) -> None:
        print(progress(results), flush=True)
        if arguments.json is not None:
            write_json(results, arguments.json)

    with Interruption() as interruption:
        try:
            results = restart.run(settings, _command(arguments), finished)
        except KeyboardInterrupt:
            return 128 + (interruption.number or 2)
        if arguments.json is not None:
            write_json(results, arguments.json)
        print(summary(results), flush=True)
        if arguments.plot is not None:
            write_plot(results, arguments.plot)
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """The command with what differs from the defaults, and of files their names: where they lie is nobody's concern."""
    words = ["megatron-ru", NAME, arguments.action]
    defaults = {"ops": _DEFAULTS, "restart": _RESTART_DEFAULTS}[arguments.action]
    for name in (
        "size", "kinds", "optimizer", "repeat", "only", "against", "device", "dtype", "tokens", "hidden", "timing",
        "seconds_per_case", "json", "markdown", "plot",
    ):  # fmt: skip
        value = getattr(arguments, name, None)
        if value is not None and value != defaults.get(name):
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
