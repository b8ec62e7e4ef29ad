"""The process that measures: reads requests, a JSON object to a line, and answers each with one.

Apart from the doctor itself because a measurement may never come back: a file system or a driver that hangs, an
all-reduce whose peer is gone. The doctor then kills this process and goes on.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """What is installed here, see `machine.describe`."""
    from megatron_ru.doctor.machine import describe

    return describe()


def files(folder: str, show: str) -> dict[str, Any]:
    """`times` of the folder as FileTimes, and whether the file named `show`, which rank 0 made, is `seen` in it."""
    from megatron_ru.doctor.file_system import measure_files

    seen = (Path(folder) / show).is_file()
    return {"times": dataclasses.asdict(measure_files(Path(folder))), "seen": seen}


def all_reduce(**request: Any) -> dict[str, Any]:
    """See `all_reduce.measure_all_reduce`."""
    from megatron_ru.doctor.all_reduce import measure_all_reduce

    return measure_all_reduce(**request)


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"describe": describe, "files": files, "all_reduce": all_reduce}


def main() -> None:
    """Answers until the input ends; an error is an answer too: {"error": one line}."""
    _end_with_parent()
    # Libraries print to descriptor 1; the answers have one of their own.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            action = ACTIONS[request.pop("do")]
            try:
                answer = action(**request)
            except Exception as error:  # whatever it is, the report shall have it
                answer = {"error": _one_line(error)}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _end_with_parent() -> None:
    """The kernel kills this process when its parent ends, even while a measurement hangs."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
