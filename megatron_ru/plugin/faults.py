"""Faults on request, for tests of what guards a run: `MEGATRON_RU_FAULT=kill,rank=1,step=5` kills rank 1 before step 5.

    MEGATRON_RU_FAULT=KIND,rank=R,step=S[,attempt=A][;ANOTHER FAULT]

KIND is `exit:N` (the process ends at once with code N), `kill` (SIGKILL), `stop` (SIGSTOP), `hang` (the rank sleeps,
while the others wait for it in their next collective) or `raise` (a RuntimeError). The fault comes when steps 1 to S-1
are done and saved, in attempt A of the guard (RU_ATTEMPT; 0 when it is not said, `any` for all of them).
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.seam import Seam

VARIABLE = "MEGATRON_RU_FAULT"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: which, where and when."""

    kind: str
    """`exit`, `kill`, `stop`, `hang` or `raise`."""
    code: int = 0
    """The exit code of `exit`."""
    rank: int
    step: int
    """The step that this rank does not begin, from 1."""
    attempt: int | None = 0
    """The attempt of the guard, None for every attempt."""

    def strike(self) -> None:
        """Does it; returns only for `stop`, when somebody has sent SIGCONT."""
        print(f"megatron_ru: {VARIABLE}: {self.kind} on rank {self.rank} before step {self.step}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.kind == "exit":
            os._exit(self.code)
        elif self.kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)
        elif self.kind == "raise":
            raise RuntimeError(f"{VARIABLE} asked for an exception before step {self.step}")
        else:
            while True:
                time.sleep(3600)


def faults_of(environ: Mapping[str, str]) -> list[Fault]:
    """The faults that this process is to suffer; raises `UserError` for a value that is not understood."""
    faults = [_fault(text) for text in environ.get(VARIABLE, "").split(";") if text.strip()]
    rank, attempt = int(environ.get("RANK", "0")), int(environ.get("RU_ATTEMPT", "0"))
    return [fault for fault in faults if fault.rank == rank and fault.attempt in (attempt, None)]


def fault_seams(faults: list[Fault], *, training: str = "megatron.training.training") -> list[Seam]:
    """The seam on the training step of the module `training`, none without faults."""
    if not faults:
        return []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train_step(*arguments: Any, **keywords: Any) -> Any:
            from megatron.training import get_args

            step = get_args().curr_iteration + 1
            for fault in faults:
                if fault.step == step:
                    fault.strike()
            return original(*arguments, **keywords)

        return train_step

    return [Seam(target=f"{training}:train_step", make=make, reason="nothing fails on request there")]


def _fault(text: str) -> Fault:
    kind, *rest = (word.strip() for word in text.split(","))
    name, _, code = kind.partition(":")
    settings = dict(word.partition("=")[::2] for word in rest)
    known = name in ("kill", "stop", "hang", "raise") if not code else name == "exit" and code.isdecimal()
    attempt = settings.pop("attempt", "0")
    numbers = [settings.pop("rank", ""), settings.pop("step", ""), "0" if attempt == "any" else attempt]
    if not known or settings or not all(number.isdecimal() for number in numbers) or int(code or 0) > 255:
        raise UserError(
            f"{VARIABLE}={text!r} is not a fault, expected exit:N, kill, stop, hang or raise, followed by "
            "rank=R,step=S[,attempt=A]; for instance kill,rank=1,step=5"
        )
    rank, step, count = (int(number) for number in numbers)
    return Fault(
        kind=name, code=int(code or 0), rank=rank, step=step, attempt=None if attempt == "any" else count
    )  # fmt: skip
