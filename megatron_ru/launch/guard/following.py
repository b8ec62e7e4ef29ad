"""The guard of a further node: it does what the first guard says, and ends when that one is gone."""

import os
import select
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ru.foundation.errors import TRY_AGAIN
from megatron_ru.launch.guard.clock import WatchClock
from megatron_ru.launch.guard.followers import TOLD
from megatron_ru.launch.guard.launcher import Launcher
from megatron_ru.launch.guard.link import GuardLink
from megatron_ru.launch.guard.protocol import GuardPlace, Message, seconds, text, whole
from megatron_ru.launch.guard.report import say
from megatron_ru.launch.guard.signals import SignalBox
from megatron_ru.launch.guard.verdict import Limits

_PAUSE_SECONDS = 1.0
_REFUSED_SECONDS = 15.0


def follow(words: Sequence[str], place: GuardPlace, node: int, limits: Limits, environ: Mapping[str, str]) -> int:
    """Runs the launcher whenever the first guard says so; returns the job's exit code, 75 when that guard is gone."""
    signals = SignalBox()
    with signals.listening():
        return _Follower(words, place, node, limits, environ, signals).run()


class _Follower:
    def __init__(
        self,
        words: Sequence[str],
        place: GuardPlace,
        node: int,
        limits: Limits,
        environ: Mapping[str, str],
        signals: SignalBox,
    ):
        self._words, self._place, self._node = words, place, node
        self._limits, self._environ, self._signals = limits, environ, signals
        self._clock = WatchClock()
        self._launcher: Launcher | None = None
        self._attempt = -1
        self._told_code = False
        self._ending: float | None = None
        self._result: int | None = None
        self._link = GuardLink(place, self._greeting, "follow", self._clock.now())

    def run(self) -> int:
        next_ping = 0.0
        while self._result is None:
            self._wait()
            now = self._clock.now()
            for message in self._link.step(now):
                self._obey(message, now)
            for number in self._signals.take(now):
                self._link.send("signalled", number=int(number))
                if not self._link.welcomed:
                    self._result = 128 + number
            if self._launcher is not None:
                code = self._launcher.poll()
                if self._ending is not None:
                    self._launcher.end(self._ending, now)
                if code is not None and not self._told_code:
                    self._told_code = True
                    self._link.send("launcher", attempt=self._attempt, code=code)
            if now >= next_ping:
                next_ping = now + _PAUSE_SECONDS
                self._link.send("ping")
            self._judge_first(now)
        self._end_launcher()
        self._link.close()
        return self._result

    def _wait(self) -> None:
        poll = select.poll()
        if self._link.fileno() >= 0:
            poll.register(self._link.fileno(), select.POLLIN | (select.POLLOUT if self._link.writes else 0))
        poll.poll(100)

    def _greeting(self) -> dict[str, Any]:
        self._told_code = False
        return {"node": self._node, "attempt": self._attempt, "host": os.uname().nodename}

    def _obey(self, message: Message, now: float) -> None:
        match message["kind"]:
            case "start" if whole(message, "attempt") != self._attempt:
                self._end_launcher()
                self._attempt = whole(message, "attempt")
                self._told_code, self._ending = False, None
                told = message.get("environ")
                own = told if isinstance(told, dict) else {}
                self._launcher = Launcher(
                    self._words, {**self._environ, **{name: text(own, name, 4096) for name in TOLD if name in own}}
                )
            case "end_launcher" if self._ending is None:
                self._ending = seconds(message, "grace")
            case "signal" if self._launcher is not None:
                self._launcher.signal(whole(message, "number", most=signal.NSIG - 1))
            case "dismissed":
                self._result = whole(message, "code", most=255)
                if text(message, "why"):
                    say(text(message, "why"))

    def _judge_first(self, now: float) -> None:
        """Ends when the first guard is gone, or has not come by the time that a start may take."""
        silent = now - self._link.heard
        limit = self._limits.stall if self._link.welcomed else self._limits.start
        refused = self._link.welcomed and self._link.refused is not None and now - self._link.refused > _REFUSED_SECONDS
        if silent > limit or refused:
            say(f"the guard of node 0 at {self._place.address}:{self._place.port} does not answer")
            self._result = TRY_AGAIN

    def _end_launcher(self) -> None:
        """Ends whatever of the last attempt is still there."""
        if self._launcher is None:
            return
        while not self._launcher.end(min(self._limits.grace, 5.0), self._clock.now()):
            select.poll().poll(50)
        self._launcher = None
