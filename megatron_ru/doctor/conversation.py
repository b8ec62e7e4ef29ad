"""Words between ranks by torch's TCPStore, with a limit on every wait."""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import RankEnvironment

_NAMES = "megatron_ru_doctor"


class LostMeetingError(RuntimeError):
    """The store is gone: rank 0, or its host, or the way there."""


class Conversation:
    """JSON values under keys, seen by all ranks. Raises LostMeetingError when the store is gone."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def say(self, key: str, value: Any) -> None:
        """Tells everybody who asks for `key`."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise LostMeetingError(str(error)) from error

    def hear(self, key: str, limit: float) -> Any | None:
        """What was said under `key`; None when nobody says it within `limit` seconds. Nobody says None."""
        end = time.monotonic() + limit
        try:
            self._store.wait([key], timedelta(seconds=max(limit, 0.001)))
            return json.loads(self._store.get(key))
        except RuntimeError as error:
            # The same exception for a wait that was in vain and for a connection that broke.
            if time.monotonic() < end - 0.01:
                raise LostMeetingError(str(error)) from error
            return None


def meet(ranks: RankEnvironment, limit: float, environ: Mapping[str, str] = os.environ) -> Conversation:
    """The conversation of this run, held by rank 0. Raises UserError where rank 0 cannot be reached or cannot listen.

    Under torchrun the store of its agent is at that address already.
    """
    dist: Any = importlib.import_module("torch.distributed")
    holds = ranks.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{ranks.master_address}:{ranks.master_port}"
    try:
        store = dist.TCPStore(
            ranks.master_address,
            ranks.master_port,
            is_master=holds,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        if holds:
            raise UserError(f"rank 0 cannot listen at {where} ({first}): export another MASTER_PORT") from error
        raise UserError(
            f"rank {ranks.rank} did not reach rank 0 at {where} within {limit:.0f} s ({first}): look whether rank 0 "
            "started, whether that address is one that this host can reach, and at firewalls between the hosts"
        ) from error
    # The agent's store survives its restarts, with all that was said before.
    return Conversation(dist.PrefixStore(f"{_NAMES}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store))


class Watchdog:
    """Ends this process when a call into torch does not come back: store calls know no limit when the other side hangs.

    `expect` is called before each of them with a generous limit.
    """

    def __init__(self) -> None:
        self._deadline = float("inf")
        self._sentence = ""
        threading.Thread(target=self._watch, daemon=True).start()

    def expect(self, seconds: float, sentence: str) -> None:
        """From now on something has to happen within `seconds`, else the process says `sentence` and ends with 1."""
        self._sentence = sentence
        self._deadline = time.monotonic() + seconds

    def rest(self) -> None:
        """Nothing is expected."""
        self._deadline = float("inf")

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            if time.monotonic() > self._deadline:
                # The main thread is inside a call that never returns; nothing else can end it.
                os.write(sys.stderr.fileno(), f"megatron-ru: {self._sentence}\n".encode())
                os._exit(1)
