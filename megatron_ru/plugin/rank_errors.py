"""How a rank says that its input is bad."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous
from megatron_ru.foundation.ranks import RankEnvironment

_OWN_FAULT = "megatron_ru_own_fault"
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
            print(f"{name}: error: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        elif getattr(error, _OWN_FAULT, False) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks when the first one leaves: let the one that speaks finish.
            time.sleep(_SILENT_SECONDS)
        return error.exit_code
    return 0


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


def _ranks_have_met() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
