"""A rank of `megatron-ru doctor --nodes` that does what rank 0 asks for."""

import itertools
import socket
import time
from collections.abc import Callable
from typing import Any

from megatron_ru.doctor.conversation import Conversation, LostMeetingError, Watchdog
from megatron_ru.doctor.worker_process import Worker
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import RankEnvironment

PINGS = 7
PING_SECONDS = 5.0
"""How long rank 0 waits for the answer to one."""
SLACK_SECONDS = 20.0
"""Beyond the limit of a step, before rank 0 counts as hanging."""


def arrive(talk: Conversation, ranks: RankEnvironment) -> None:
    """Tells rank 0 who came."""
    talk.say(f"arrival/{ranks.rank}", {"host": socket.gethostname(), "local_rank": ranks.local_rank})


def take_part(talk: Conversation, ranks: RankEnvironment, limit: float, worker: Worker, watchdog: Watchdog) -> int:
    """The exit code that rank 0 gives to all. Raises UserError when rank 0 falls silent."""
    patience = limit + SLACK_SECONDS
    lost = f"rank 0 at {ranks.master_address}:{ranks.master_port} fell silent: look at its host first"
    try:
        watchdog.expect(SLACK_SECONDS, lost)
        arrive(talk, ranks)
        for number in itertools.count():
            watchdog.expect(patience + SLACK_SECONDS / 4, lost)
            step = talk.hear(f"step/{number}", patience)
            if step is None:
                raise UserError(f"{lost}; nothing came for {patience:.0f} s")
            if step["do"] == "end":
                talk.say(f"bye/{ranks.rank}", True)
                watchdog.rest()
                return int(step["code"])
            if step["do"] == "clock":
                if ranks.rank in step["ranks"]:
                    tell_time(talk, ranks.rank, limit=patience)
                continue
            request: dict[str, Any] | None = step["requests"].get(str(ranks.rank))
            if request is not None:
                watchdog.expect(patience + SLACK_SECONDS / 4, lost)
                talk.say(f"result/{number}/{ranks.rank}", worker.ask(request, step["limit"]))
    except LostMeetingError as error:
        raise UserError(f"{lost} ({str(error).splitlines()[0]})") from error
    raise AssertionError  # the loop has no end of its own


def tell_time(talk: Conversation, rank: int, limit: float, clock: Callable[[], float] = time.time) -> None:
    """Answers rank 0's questions for this host's clock."""
    for ping in range(PINGS):
        if talk.hear(f"clock/{rank}/{ping}/ask", limit) is None:
            return
        talk.say(f"clock/{rank}/{ping}/time", clock())
