"""How a rank says what ends it, and leaves although other ranks wait for it."""

import io
import multiprocessing
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous
from megatron_ru.foundation.ranks import RankEnvironment
from megatron_ru.plugin.heartbeats import tell_failure

_OWN_FAULT = "megatron_ru_own_fault"
_hooked = False
_SILENT_SECONDS = 2.0


def exit_code_of(run: Callable[[], Any], name: str) -> int:
    """0 when `run` returns; a `UserError` is printed in one sentence and gives its exit code.

    Before the ranks have met they all see the same mistake, so the first rank of each host speaks for the others.
    Afterwards a rank speaks for itself and says which one it is; so it does when its own environment is at fault.
    """
    try:
        run()
    except UserError as error:
        if _ranks_have_met():
            print(f"{name}: error: rank {os.environ['RANK']}: {error}", file=_stderr(), flush=True)
        elif getattr(error, _OWN_FAULT, False) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name}: error: {error}", file=_stderr(), flush=True)
        else:
            # A launcher ends all ranks when the first one leaves: let the one that speaks finish.
            time.sleep(_SILENT_SECONDS)
        tell_failure(error)
        _leave_waiting_ranks(error.exit_code)
        return error.exit_code
    return 0


def end_on_failure() -> None:
    """From now on an exception that nobody catches is told to the keeper and ends this process at once, code 1.

    Python would first tear down the process group, which waits for ranks that wait for this one. Called again, it does
    nothing.
    """
    global _hooked
    if _hooked:
        return
    _hooked = True
    others = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        others(kind, error, trace)
        # Python ends a keyboard interrupt by the signal itself.
        if isinstance(error, Exception):
            tell_failure(error)
            _leave_waiting_ranks(1)

    sys.excepthook = tell


def meet_ranks() -> RankEnvironment:
    """The ranks of this process, exported to its environment; raises `UserError` when the environment is at fault."""
    try:
        return ensure_rendezvous(os.environ)
    except UserError as error:
        setattr(error, _OWN_FAULT, True)
        raise


def refused_by_megatron(error: AssertionError) -> UserError:
    """The sentence for an argument check of Megatron that failed; many of them carry no message but their code."""
    message = " ".join(str(error).split())
    if not message:
        message = f"its check `{traceback.extract_tb(error.__traceback__)[-1].line}` failed"
    return UserError(f"Megatron refuses these arguments: {message}")


def _leave_waiting_ranks(code: int) -> None:
    """Ends this process here and now when there are other ranks; returns when it is alone."""
    if not _ranks_have_met() or sys.modules["torch.distributed"].get_world_size() == 1:
        return
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(OSError, ValueError):
        if isinstance(sys.stderr, io.StringIO):
            # What torch would write after we return, as it would write it.
            prefix = f"[rank{os.environ.get('RANK', '0')}]: "
            _stderr().write(textwrap.indent(sys.stderr.getvalue(), prefix, lambda line: True))
    for stream in (sys.stdout, _stderr()):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _stderr() -> TextIO:
    """The standard error stream also while torch's own hook holds back what is written there, until we return."""
    held = isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None
    return sys.__stderr__ if held else sys.stderr  # type: ignore[return-value]


def _ranks_have_met() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
