"""What the process of a rank does first, before it imports torch."""

import os

from megatron_ru.plugin import exit_signals, heartbeats
from megatron_ru.plugin.rank_errors import end_on_failure


def start_rank(*, listen: bool) -> None:
    """Listens to signals under a guard or when `listen` says so, opens the heartbeat that a keeper asked for, and ends
    at once when the rank fails. What was done before is not done again."""
    if listen or exit_signals.under_guard(os.environ):
        exit_signals.listen()
    heartbeats.open_heartbeat(os.environ)
    end_on_failure()
