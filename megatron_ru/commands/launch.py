"""Render a job script for a scheduler or a launcher, check it, or send it off.

megatron-ru launch slurm --nodes 2 --time 32:00:00 -- megatron-ru pretrain_gpt ARGS
megatron-ru launch abci-v --nodes 8 --time 3d --group gaa50000 --preset 13b_v100 -- megatron-ru pretrain_gpt ARGS

Prints the script unless told otherwise. The words behind -- reach every rank exactly as they are.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import submission
from megatron_ru.launch.field_help import field_help
from megatron_ru.launch.job_spec import SIGNALS, JobSpec
from megatron_ru.launch.presets import PARALLEL_FLAGS, PRESETS, parallel_size
from megatron_ru.launch.target import TARGETS

NAME = "launch"
SUMMARY = "render, check or submit a job: ABCI, Slurm, mpirun, torchrun, or this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target, an option for each field of JobSpec, what to do with the script, and the command."""
    text = {name: help.replace("%", "%%") for name, help in field_help(JobSpec).items()}
    parser.add_argument("target", metavar="TARGET", help=f"{text['target']} One of {', '.join(TARGETS)}.")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help=f"{text['nodes']} Default: %(default)s.")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G",
        help=f"{text['gpus_per_node']} Default: all of a node on ABCI, 1 on local, 8 elsewhere.",
    )  # fmt: skip
    for field, metavar in (
        ("time", "TIME"),
        ("group", "GROUP"),
        ("queue", "NAME"),
        ("virtual_environment", "FOLDER"),
        ("container", "IMAGE"),
        ("array", "NUMBERS"),
        ("dependency", "JOBS"),
        ("hostfile", "FILE"),
    ):
        parser.add_argument(_flag(field), metavar=metavar, help=text[field])
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help=text["cpus_per_task"])
    parser.add_argument("--name", default="megatron-ru", metavar="NAME", help=f"{text['name']} Default: %(default)s.")
    parser.add_argument("--output", default=".", metavar="FOLDER", help=f"{text['output']} Default: this one.")
    for field, metavar in (("modules", "MODULE"), ("mounts", "MOUNT"), ("interfaces", "NAME")):
        parser.add_argument(_flag(field), nargs="+", default=[], metavar=metavar, help=text[field])
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help=f"{text['env']} Repeatable.")
    parser.add_argument("--requeue", action="store_true", help=text["requeue"])
    parser.add_argument("--torchrun", action="store_true", help=text["torchrun"])
    parser.add_argument("--signal", choices=SIGNALS, help=text["signal"])
    parser.add_argument(
        "--signal-seconds", type=int, default=300, metavar="S", help=f"{text['signal_seconds']} Default: %(default)s."
    )
    parser.add_argument("--no-guard", action="store_true", help="Leave guard and keepers out.")
    for field, kind, metavar in (
        ("retries", int, "K"),
        ("stall", float, "S"),
        ("start_timeout", float, "S"),
        ("grace", float, "S"),
    ):
        parser.add_argument(_flag(field), type=kind, metavar=metavar, help=text[field])
    parser.add_argument("--spares", type=int, default=0, metavar="N", help=text["spares"])
    parser.add_argument("--preset", metavar="NAME", help=f"Flags behind the command: {_preset_names()}.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="Print the script, byte for byte what would be sent.")
    action.add_argument("--check", action="store_true", help="Ask the scheduler whether it would take the job.")
    action.add_argument("--submit", action="store_true", help="Send the script and print the job's id.")
    parser.add_argument("command_words", nargs="+", metavar="COMMAND", help=f"Behind --. {text['command']}")
    keep_all_behind_dashes(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints, checks or submits. Returns 0 or the scheduler's exit code; raises UserError."""
    script = TARGETS[arguments.target].render(job_of(arguments))
    if arguments.check:
        return submission.check(script, arguments.target)
    if arguments.submit:
        return submission.submit(script, arguments.target, arguments.output)
    sys.stdout.buffer.write(script.content)
    sys.stdout.buffer.flush()
    return 0


def job_of(arguments: argparse.Namespace) -> JobSpec:
    """The job that the options describe; the parallel sizes are those of the command."""
    command = tuple(arguments.command_words)
    if arguments.preset is not None:
        command = PRESETS[arguments.preset].applied_to(command)
    gpus = arguments.gpus_per_node
    parallel = {f"{kind}_parallel": parallel_size(command, flag) for flag, kind in PARALLEL_FLAGS.items()}
    return JobSpec(
        target=arguments.target,
        command=command,
        nodes=arguments.nodes,
        gpus_per_node=TARGETS[arguments.target].gpus_per_node if gpus is None else gpus,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        name=arguments.name,
        group=arguments.group,
        queue=arguments.queue,
        modules=tuple(arguments.modules),
        virtual_environment=arguments.virtual_environment,
        container=arguments.container,
        mounts=tuple(arguments.mounts),
        env=_environment(arguments.env),
        output=arguments.output,
        array=arguments.array,
        dependency=arguments.dependency,
        requeue=arguments.requeue,
        signal=arguments.signal,
        signal_seconds=arguments.signal_seconds,
        interfaces=tuple(arguments.interfaces),
        hostfile=arguments.hostfile,
        torchrun=arguments.torchrun,
        guard=not arguments.no_guard,
        retries=arguments.retries,
        stall=arguments.stall,
        start_timeout=arguments.start_timeout,
        grace=arguments.grace,
        spares=arguments.spares,
        **parallel,
    )


def keep_all_behind_dashes(parser: argparse.ArgumentParser) -> None:
    """argparse takes further `--` out of the words behind the first; a command may need them."""
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
        words = list(args)
        behind = words[words.index("--") + 1 :] if "--" in words else []
        if not behind:
            return parse(words, namespace)
        found, rest = parse([*words[: words.index("--")], "--", behind[0]], namespace)
        found.command_words = behind
        return found, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _environment(given: list[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"--env {pair} has no value: write --env {pair}=VALUE")
        if name in found and found[name] != value:
            raise UserError(f"--env gives {name} both {found[name]!r} and {value!r}: keep one of them")
        found[name] = value
    return found


def _preset_names() -> str:
    return "; ".join(f"{name}, {preset.reason}" for name, preset in PRESETS.items())


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
