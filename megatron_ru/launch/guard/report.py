"""What a guard says about an attempt: a few plain lines for people, one JSON line for programs."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ru.launch.guard.retries import Retry
from megatron_ru.launch.guard.verdict import Verdict


def sentences(attempt: int, seconds: float, verdict: Verdict, retry: Retry) -> list[str]:
    """The lines about an attempt; none about one that went well at once."""
    if verdict.code == 0:
        return [f"attempt {attempt} went well, {seconds:.1f} s after its start"] if attempt else []
    who = "" if verdict.rank is None else f"rank {verdict.rank}" + (f" on {verdict.host}" if verdict.host else "")
    step = f" after step {verdict.step}" if verdict.step >= 0 else ""
    ended = "ended" if verdict.fault == "saved" else "failed"
    lines = [
        f"attempt {attempt} {ended} {seconds:.1f} s after its start: {who}{step}{': ' if who else ''}{verdict.why}"
    ]
    if retry.why:
        lines.append(retry.why)
    if retry.again:
        lines.append(f"attempt {attempt + 1} follows in {retry.pause:g} s")
    else:
        lines.append(f"exit code {verdict.code}" + (", worth another start" if verdict.code == 75 else ""))
    return lines


def record(job: str, attempt: int, seconds: float, verdict: Verdict, retry: Retry) -> Mapping[str, Any]:
    """The same for programs, with units in the names."""
    return {
        "time_unix_seconds": round(time.time(), 3),
        "job": job,
        "attempt": attempt,
        "attempt_seconds": round(seconds, 3),
        "fault": verdict.fault,
        "exit_code": verdict.code,
        "rank": verdict.rank,
        "host": verdict.host,
        "step": verdict.step,
        "why": verdict.why,
        "again": retry.again,
        "pause_seconds": retry.pause,
        "left_out": list(retry.left_out),
        "note": retry.why,
    }


def say(line: str) -> None:
    """One line on stderr, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} megatron-ru guard: {line}", file=sys.stderr, flush=True)


def append(path: str, entry: Mapping[str, Any]) -> None:
    """Adds the entry as a line of JSON; a disk that is full is no reason to end a job."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        say(f"the report {path} cannot be written: {error.strerror}")
