"""Say what this machine, or a set of machines, offers to a run: a verdict for each thing, and what to do about it.

    megatron-ru doctor                     packages, compiled ops, compilers and GPUs of this machine
    megatron-ru doctor --nodes gpu1,gpu2   also what is between them: all-reduces, clocks, files, versions
    megatron-ru launch slurm --nodes 2 -- megatron-ru doctor --nodes auto

Verdicts are ok, slow (runs work, and lose time or safety), broken (runs fail) and absent (nobody needs it). The exit
code is 1 when something is broken, else 0. With --nodes auto this process is one of the ranks that a launcher started.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ru.doctor.finding import Finding, exit_code, table
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output

NAME = "doctor"
SUMMARY = "say what is installed, which ops are compiled, and whether hosts work together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which machines to look at, and the form of output."""
    parser.add_argument(
        "--nodes", metavar="HOSTS",
        help="also what is between hosts: a hostfile or HOST,HOST, to which this goes over mpirun, or auto inside a "
        "launcher",
    )  # fmt: skip
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write a list of objects, with the numbers that were measured, to FILE; to stdout, without a table, when "
        "there is no FILE",
    )  # fmt: skip
    parser.add_argument(
        "--folder", default=".", metavar="FOLDER",
        help="with --nodes: where checkpoints go, whose speed is measured (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S",
        help="with --nodes: seconds that each step may take before a host counts as hanging (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G",
        help="with hosts: ranks on each (default: as many as this machine has GPUs, at least 1)",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="what is slow makes the exit code 1 too")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings. Returns 0 or 1; raises UserError for hosts and folders that are none."""
    if arguments.nodes is None:
        from megatron_ru.doctor.machine import examine

        findings = list(examine())
        report(findings, arguments.json)
        return exit_code(findings, arguments.strict)
    if not (math.isfinite(arguments.timeout) and arguments.timeout >= 1):
        raise UserError(f"--timeout {arguments.timeout:g} leaves no time to answer: give at least a second")
    if arguments.nodes != "auto":
        return _start(arguments)
    from megatron_ru.doctor.together import examine_together

    return examine_together(
        arguments.timeout,
        Path(arguments.folder).absolute(),
        arguments.strict,
        lambda findings: report(findings, arguments.json),
    )


def report(findings: Sequence[Finding], destination: str | None) -> None:
    """The table on stdout; as JSON to the file `destination`, or to stdout alone where it is `-`."""
    written = json.dumps([dataclasses.asdict(finding) for finding in findings], ensure_ascii=False, indent=2) + "\n"
    if destination == "-":
        sys.stdout.write(written)
        return
    sys.stdout.write(table(findings))
    if destination is not None:
        with atomic_output(destination, "w", encoding="utf-8") as stream:
            stream.write(written)


def _start(arguments: argparse.Namespace) -> int:
    """Over the named hosts; relative paths are those of this folder."""
    from megatron_ru.doctor.gpus import GpuTrouble, read_gpus
    from megatron_ru.doctor.start import hosts_of, start_over

    words = ["--folder", str(Path(arguments.folder).absolute()), "--timeout", f"{arguments.timeout:g}"]
    if arguments.json is not None:
        words += ["--json"] if arguments.json == "-" else ["--json", str(Path(arguments.json).absolute())]
    if arguments.strict:
        words.append("--strict")
    gpus = arguments.gpus_per_node
    if gpus is None:
        try:
            gpus = max(1, len(read_gpus() or ()))
        except GpuTrouble as trouble:
            raise UserError(f"{trouble}; or say how many ranks each host gets with --gpus-per-node") from trouble
    return start_over(hosts_of(arguments.nodes), gpus, words, arguments.timeout)
