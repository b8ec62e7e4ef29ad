"""Watch a launcher and the ranks that it starts; end what hangs, name who was to blame, and try again.

    megatron-ru guard --retries 3 -- mpirun -np 8 megatron-ru keep -- megatron-ru pretrain_gpt ARGS

`megatron-ru launch` writes both words into its scripts. Exit codes: a rank's own, 128 + signal for one that was
killed, 75 for what the guard ended itself and what is worth another start.
"""

import argparse
import os

from megatron_ru.foundation.errors import UserError

SUMMARY = "watch a launcher and its ranks: hangs become exit codes and restarts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the limits, what follows a failure, where to listen, and the launcher."""
    from megatron_ru.commands.launch import keep_all_behind_dashes

    def number(flag: str, default: float, help: str) -> None:
        parser.add_argument(flag, type=float, default=default, metavar="S", help=f"{help} Default: %(default)g s.")

    number("--stall", 600.0, "Longest time between two signs of life of a rank that trains.")
    parser.add_argument(
        "--start-timeout", type=float, metavar="S",
        help="Longest time to the first training step. Default: 1800 s for ranks that send signs of life, none for "
        "others; what is given here holds for all.",
    )  # fmt: skip
    number("--grace", 30.0, "Time between TERM and KILL.")
    parser.add_argument("--retries", type=int, default=0, metavar="K", help="Attempts after the first. Default: 0.")
    number("--back-off", 5.0, "Pause before the second attempt, doubled for each further one, 60 s at most.")
    parser.add_argument(
        "--report", metavar="FILE", help="File that gets a JSON line for each attempt (RU_GUARD_REPORT)."
    )
    parser.add_argument("--job", default="", metavar="ID", help="What to call the job.")
    parser.add_argument(
        "--address", default="127.0.0.1", metavar="A", help="Where keepers reach it. Default: %(default)s."
    )
    parser.add_argument("--port", type=int, default=0, metavar="P", help="Port to listen on. Default: any.")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="Nodes with a guard and a launcher each.")
    parser.add_argument("--node", type=int, default=0, metavar="R", help="Which of them this is; all follow node 0.")
    parser.add_argument("--spares", type=int, default=0, metavar="N", help="Hosts beyond those that an attempt needs.")
    parser.add_argument("--hostfile", metavar="FILE", help="The launcher's hostfile, when some of its hosts are spare.")
    parser.add_argument(
        "--signal-after", metavar="NAME@S", help="Act as if this signal had come S seconds after the start: USR1@3600."
    )
    parser.add_argument("command_words", nargs="+", metavar="LAUNCHER", help="Behind --. What starts the ranks.")
    keep_all_behind_dashes(parser)


def run(arguments: argparse.Namespace) -> int:
    """Guards; returns the exit code of the job. Raises UserError."""
    from megatron_ru.launch.guard.following import follow
    from megatron_ru.launch.guard.protocol import GuardPlace
    from megatron_ru.launch.guard.session import GuardSettings, guard
    from megatron_ru.launch.guard.verdict import Limits

    start = arguments.start_timeout
    for flag in ("stall", "start_timeout", "grace", "back_off", "retries", "spares", "port"):
        value = getattr(arguments, flag)
        least = 0.1 if flag in ("stall", "start_timeout") else 0
        most = 65535 if flag == "port" else 10_000_000
        if value is not None and not least <= value <= most:
            raise UserError(f"--{flag.replace('_', '-')} {value:g} is not between {least} and {most}")
    if not 0 <= arguments.node < arguments.nodes:
        raise UserError(f"--node {arguments.node} is not between 0 and {arguments.nodes - 1}: --nodes says how many")
    limits = Limits(
        stall=arguments.stall, start=1800.0 if start is None else start, start_for_all=start is not None,
        grace=arguments.grace,
    )  # fmt: skip
    token = os.environ.get("RU_GUARD_TOKEN", "")
    if arguments.nodes > 1:
        if arguments.port == 0:
            raise UserError(f"{arguments.nodes} nodes have to know the guard's port: give the same --port to each")
        # Whoever reaches this port can end the job, as whoever reaches the store's can.
        token = token or "nodes"
    if arguments.node > 0:
        place = GuardPlace(arguments.address, arguments.port, token)
        return follow(arguments.command_words, place, arguments.node, limits, os.environ)
    settings = GuardSettings(
        limits=limits,
        retries=arguments.retries,
        back_off=arguments.back_off,
        report=arguments.report or os.environ.get("RU_GUARD_REPORT") or None,
        job=arguments.job,
        address=arguments.address,
        port=arguments.port,
        token=token,
        nodes=arguments.nodes,
        spares=arguments.spares,
        hostfile=arguments.hostfile,
        signal_after=_signal_after(arguments.signal_after),
    )
    return guard(arguments.command_words, settings, os.environ)


def _signal_after(written: str | None) -> tuple[str, float] | None:
    if written is None:
        return None
    name, _, after = written.partition("@")
    if name not in ("USR1", "USR2", "TERM", "INT") or not after.isdigit():
        raise UserError(f"--signal-after {written!r} is not USR1, USR2, TERM or INT with @SECONDS behind it")
    return name, float(after)
