"""Which rank a keeper keeps, of which attempt of which job."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import launched_ranks
from megatron_ru.launch.guard.protocol import ATTEMPT_VARIABLE, JOB_VARIABLE


@dataclass(frozen=True)
class RankIdentity:
    """What a keeper says of itself when it greets the guard."""

    job: str
    attempt: int
    rank: int
    world: int
    """Ranks in the whole run."""
    host: str

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "RankIdentity":
        """Rank and size of the world as the rank itself will find them, job and attempt as the guard has named them."""
        rank, world = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
        try:
            found = launched_ranks(environ)
        except UserError:
            # What is wrong with them the rank itself will tell.
            pass
        else:
            rank, world = found.rank or 0, found.world_size or 1
        return cls(environ.get(JOB_VARIABLE, ""), _number(environ, ATTEMPT_VARIABLE, 0), rank, world, host_name())


def host_name() -> str:
    """The name by which the scheduler knows this host."""
    # Slurm may know its nodes by other names than they themselves.
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    written = environ.get(name, "")
    return int(written) if written.isascii() and written.isdigit() and len(written) < 16 else default
