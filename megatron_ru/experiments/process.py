"""A long-running child process: its output in a log, its progress watched, its end certain."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from megatron_ru.foundation.errors import UserError

_TAIL_LINES = 15


class RunFailed(UserError):
    """A child process failed through no fault of the input that we know of."""

    exit_code = 1


def run_logged(
    what: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    watch: Callable[[], object] = lambda: None,
    *,
    stdout: Path | None = None,
    seconds_between: float = 0.25,
) -> None:
    """Runs the command with its output appended to `log`; calls `watch` again and again meanwhile, and once after.

    With `stdout` only stderr goes to the log, and stdout replaces that file.

    Raises RunFailed, with the end of the log on stderr, when it exits with another code than 0. Whatever ends the
    wait (Ctrl-C, an error in `watch`) ends the process and its children too.
    """
    with ExitStack() as files:
        output = files.enter_context(log.open("ab"))
        began = output.tell()
        answer = files.enter_context(stdout.open("wb")) if stdout is not None else output
        # A session of its own, so that a signal reaches the launcher with all its ranks.
        process = subprocess.Popen(
            command, stdout=answer, stderr=output, stdin=subprocess.DEVNULL, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None:
            watch()
            time.sleep(seconds_between)
        watch()
    finally:
        end_session(process)
    if process.returncode:
        print(f"\nthe last lines of {log}:\n{tail(log, began)}", file=sys.stderr)
        code = process.returncode
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        raise RunFailed(f"{what} ended with {how}; the whole log is {log}")


def end_session(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Ends what is left of a process that leads a session, first asking, then not."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)


def tail(log: Path, start: int = 0, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log from byte `start` on; of Python's tracebacks by many ranks, one is enough."""
    with log.open("rb") as stream:
        stream.seek(start)
        found = stream.read().decode("utf-8", errors="replace").splitlines()
    said = [number for number, line in enumerate(found) if ": error: " in line]
    # Launchers write a page after the sentence that matters.
    return found[said[-1]] if said else "\n".join(found[-lines:])
