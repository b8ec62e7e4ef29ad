"""What a command costs: processor seconds of it and its children, memory of the largest of them, wall seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ru.foundation.errors import UserError

# A process begins with the memory of the one that forked it, and the kernel counts that: this one is small.
_LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.monotonic()
with open(sys.argv[1], "wb") as stream:
    code = subprocess.run(sys.argv[2:], stdout=stream, stderr=stream).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, time.monotonic() - started, used.ru_maxrss]))
"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    processor_seconds: float
    """User and system, of the process and of every child that it waited for."""
    wall_seconds: float
    peak_megabytes: float
    """The largest resident size of one process among them; children that were killed are not counted."""


def measure(command: Sequence[str], log: str | os.PathLike[str], environment: Mapping[str, str]) -> Cost:
    """Runs `command` with its output in `log` and returns what it cost. Raises UserError when it fails."""
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, os.fspath(log), *command]
    done = subprocess.run(launcher, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    code, processor_seconds, wall_seconds, kilobytes = json.loads(done.stdout)
    if code != 0:
        with open(log, errors="replace") as stream:
            last = stream.read()[-2000:]
        raise UserError(f"{command[0]} {command[1]} ended with code {code}; its last words:\n{last}")
    return Cost(processor_seconds=processor_seconds, wall_seconds=wall_seconds, peak_megabytes=kilobytes / 1024)
