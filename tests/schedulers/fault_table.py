"""Measures what ends a job after each fault: ours, bare mpirun, bare torchrun.

    python -m tests.schedulers.fault_table [--cap 60] [--output benchmarks/results/faults_202611]

Needs root on Linux, as the tests beside it do. Ours runs alone; the bare launchers, which mostly wait, run four at a
time. Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ru.foundation.files import atomic_output
from tests.schedulers import hosts as namespaces
from tests.schedulers import packages
from tests.schedulers.cluster import make_environment, user_environment
from tests.schedulers.faults import FAULTS, GRACE, LAUNCHERS, STALL, Outcome, measure, name_of_code
from tests.schedulers.hosts import Hosts

AT_ONCE = 4
PROJECT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Measures and writes; 2 where this machine cannot have hosts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", type=float, default=60, metavar="S", help="Seconds to watch. Default: %(default)g.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/faults_202611"), metavar="STEM")
    arguments = parser.parse_args()
    reason = packages.why_missing(packages.HOSTS, packages.OPEN_MPI) or namespaces.why_not()
    if reason is not None:
        print(f"no faults can be measured here: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ru-faults-") as folder:
        outcomes, versions = measured(Path(folder), arguments.cap)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m tests.schedulers.fault_table",
        "hosts": "two, network namespaces of one machine, two ranks on each; the victim is rank 3 or its host",
        "cores": os.cpu_count(),
        "system": f"Linux {platform.release().split('-')[0]}",
        "versions": versions,
        "stall_limit_seconds": STALL,
        "grace_seconds": GRACE,
        "cap_seconds": arguments.cap,
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(record, indent=1, ensure_ascii=False) + "\n"), (".md", page(record))):
        with atomic_output(arguments.output.with_suffix(suffix), "w", encoding="utf-8") as stream:
            stream.write(text)
    print(page(record))
    return 0


def measured(folder: Path, cap: float) -> tuple[list[Outcome], dict[str, str]]:
    """The outcome of every fault under every launcher, and the versions that took part."""

    def one(launcher: str, fault: str) -> Outcome:
        place = folder / f"{launcher}-{fault}"
        with hosts_in(place) as hosts:
            outcome = measure(hosts, place / "job", launcher, FAULTS[fault], cap)
        if outcome.verdict:
            # Where a rank hung is told with its file, whose folder is this machine's business.
            why = str(outcome.verdict["why"]).replace(f"{PROJECT}/", "")
            outcome = dataclasses.replace(outcome, verdict={**outcome.verdict, "why": why})
        print(f"{launcher:9} {fault:7} {_time(outcome.seconds, cap):>6} code {name_of_code(outcome.code)}", flush=True)
        return outcome

    with hosts_in(folder / "versions") as hosts:
        mpirun = hosts.run("h1", ["mpirun", "--version"]).stdout.split("\n")[0]
    versions = {
        "Open MPI": mpirun.split()[-1],
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }
    outcomes = [one("ours", fault) for fault in FAULTS]
    bare = [(launcher, fault) for launcher in LAUNCHERS if launcher != "ours" for fault in FAULTS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes += pool.map(one, *zip(*bare, strict=True))
    return outcomes, versions


def hosts_in(folder: Path) -> Hosts:
    """Three hosts with a user's environment, not yet started."""
    folder.mkdir()
    hosts = Hosts(folder, ("h0", "h1", "h2"))
    hosts.path.append(make_environment(folder) / "bin")
    hosts.environment.update(user_environment())
    return hosts


def page(record: dict[str, Any]) -> str:
    """The table for people."""
    cap = record["cap_seconds"]
    lines = [
        "# Faults: seconds from the fault to the end of the job, and its exit code",
        "",
        f"{record['date']}, `{record['command']}`, {record['cores']} cores, {record['system']}, "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f". Hosts: {record['hosts']}. The job is an all-reduce loop on gloo whose collectives wait for an hour; "
        f"stall limit of ours {record['stall_limit_seconds']:g} s, {record['grace_seconds']:g} s from TERM to KILL; "
        f"watched for {cap:g} s. Left: processes of the job on hosts that can be reached, 2 s after its end or at the "
        "end of the watch. gloo notices a connection that closes, so nobody waits for a rank that has exited.",
        "",
        "| fault | ours: s | code | left | who was to blame "
        "| bare mpirun: s | code | left | bare torchrun: s | code | left |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_place = {(outcome["fault"], outcome["launcher"]): outcome for outcome in record["outcomes"]}
    for fault in FAULTS.values():
        cells = []
        for launcher in LAUNCHERS:
            outcome = by_place[fault.name, launcher]
            cells += [_time(outcome["seconds"], cap), name_of_code(outcome["code"]), str(outcome["left"])]
            if launcher == "ours":
                verdict = outcome["verdict"]
                cells.append(f"rank {verdict['rank']} on {verdict['host']}: {verdict['why']}" if verdict else "nobody")
        lines.append(f"| {fault.title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _time(seconds: float | None, cap: float) -> str:
    return f"> {cap:g}" if seconds is None else f"{seconds:.1f}"


if __name__ == "__main__":
    sys.exit(main())
