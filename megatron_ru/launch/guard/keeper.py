"""What stands between a launcher and one rank: it starts the rank, tells the guard how it fares, and ends it."""

import math
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import TRY_AGAIN
from megatron_ru.foundation.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from megatron_ru.foundation.heartbeat import Beat, Phase, create_beat_file, read_beat, read_failure, stacks_path
from megatron_ru.launch.guard.clock import WatchClock
from megatron_ru.launch.guard.ending import Ending
from megatron_ru.launch.guard.identity import RankIdentity, host_name
from megatron_ru.launch.guard.link import GuardLink
from megatron_ru.launch.guard.orphans import MARK, end_orphans, mark_of
from megatron_ru.launch.guard.processes import look_at
from megatron_ru.launch.guard.protocol import (
    GUARD_VARIABLE,
    GuardPlace,
    Message,
    seconds,
    text,
    whole,
)
from megatron_ru.launch.guard.rank_process import RankProcess, finder
from megatron_ru.launch.guard.reaper import Reaper
from megatron_ru.launch.guard.stacks import frames_of

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_ONE_SIGNAL_SECONDS = 1.0
_LAST_WORD_SECONDS = 3.0
_REFUSED_SECONDS = 15.0
_STACKS_SECONDS = 0.5
_MOST_FRAMES = 12
_LOOK_PINGS = 5


def keep(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the command and returns its exit code, 128 + signal where it was killed, 75 where the guard is gone.

    Without RU_GUARD the command takes this process's place. Raises UserError for a RU_GUARD that is none.
    """
    written = environ.get(GUARD_VARIABLE)
    if not written:
        try:
            os.execvpe(words[0], list(words), dict(environ))
        except OSError as error:
            print(f"megatron-ru keep: {words[0]}: {error.strerror}", file=sys.stderr)
            return 126 if isinstance(error, PermissionError) else 127
    place = GuardPlace.parsed(written)
    for orphan, mark in end_orphans():
        job, attempt, *_ = mark.split(":")
        _say(f"ended process {orphan.pid} on {host_name()}, left over from attempt {attempt} of job {job}")
    return _Keeper(place, words, environ).run()


class _Keeper:
    def __init__(self, place: GuardPlace, words: Sequence[str], environ: Mapping[str, str]):
        self._of = RankIdentity.of(environ)
        self._folder = tempfile.mkdtemp(prefix="megatron-ru-keeper-")
        self._beats = str(Path(self._folder) / "beats")
        create_beat_file(self._beats)
        own = look_at(os.getpid())
        assert own is not None
        self._mark = mark_of(self._of.job.replace(":", "_"), self._of.attempt, own)
        self._clock = WatchClock()
        self._stall, self._grace, self._pause = 600.0, 30.0, 1.0
        self._signals: dict[int, float] = {}
        self._beat, self._beat_at = Beat(0, -1, Phase.STARTING), 0.0
        self._ending: Ending | None = None
        self._stacks_at: float | None = None
        self._told_end, self._noted = False, False
        self._known: set[tuple[int, int]] = set()
        self._guard_gone = False
        self._complained = False
        inside = {**environ, MARK: self._mark, HEARTBEAT_VARIABLE: self._beats}
        self._process = RankProcess(words, inside, self._beats)
        self._link = GuardLink(place, self._greeting, "hello", self._clock.now())

    def run(self) -> int:
        reading, writing = os.pipe()
        for descriptor in (reading, writing):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            # Under nohup a hang-up is to be no news.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
        reaper = self._reaper = Reaper(self._mark, self._grace, self._folder)
        # The guard is called before the rank starts: what happens early is to be heard too.
        for message in self._link.step(self._clock.now()):
            self._obey(message, self._clock.now())
        self._process.start()
        reaper.tell("session", self._process.pid)
        try:
            self._loop(reading)
        finally:
            self._link.close()
            reaper.dismiss()
            shutil.rmtree(self._folder, ignore_errors=True)
        code = self._process.code
        return TRY_AGAIN if self._guard_gone or code is None else code

    def _loop(self, signals: int) -> None:
        next_ping, last_look = 0.0, -math.inf
        ended_at = None
        while True:
            self._wait(signals)
            now = self._clock.now()
            self._process.take_leave()
            self._read_beat(now)
            for message in self._link.step(now):
                self._obey(message, now)
            if now >= next_ping:
                next_ping = now + self._pause
                self._ping(now)
            if now >= last_look + _LOOK_PINGS * self._pause:
                last_look = now
                self._look_around()
            self._send_stacks(now)
            self._judge_guard(now)
            if self._process.code is not None:
                if ended_at is None:
                    ended_at = now
                self._tell_end(now)
            if self._ending is None:
                continue
            gone = self._ending.step(now)
            nobody = self._guard_gone or (not self._link.welcomed and self._link.refused is not None)
            heard = self._noted or nobody or ended_at is None or now > ended_at + _LAST_WORD_SECONDS
            if gone and heard:
                return

    def _wait(self, signals: int) -> None:
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        if self._link.fileno() >= 0:
            poll.register(self._link.fileno(), select.POLLIN | (select.POLLOUT if self._link.writes else 0))
        hurried = self._ending is not None or self._stacks_at is not None
        poll.poll(50 if hurried else min(self._pause, 0.25) * 1000)
        with suppress(BlockingIOError):
            for number in os.read(signals, 512):
                self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """Once, though launcher and guard may both have sent it."""
        if number not in PASSED_ON:
            return
        now = self._clock.now()
        if now - self._signals.get(number, -_ONE_SIGNAL_SECONDS) < _ONE_SIGNAL_SECONDS:
            return
        self._signals[number] = now
        self._link.send("signalled", number=int(number))
        with suppress(ProcessLookupError):
            self._process.signal(number, self._beat.counter > 0)

    def _greeting(self) -> dict[str, Any]:
        # A new line knows nothing of what the last one may have lost.
        self._told_end = False
        return asdict(self._of)

    def _obey(self, message: Message, now: float) -> None:
        match message["kind"]:
            case "welcome":
                self._stall = seconds(message, "stall") or self._stall
                self._grace = seconds(message, "grace")
                self._pause = min(max(seconds(message, "pause"), 0.05), 10.0)
                self._reaper.tell("grace", self._grace)
            case "stop":
                self._begin_ending(now)
            case "signal":
                self._pass_on(whole(message, "number"))
            case "stacks":
                asked = self._process.ask_for_stacks(self._beat.counter > 0)
                self._stacks_at = now + (_STACKS_SECONDS if asked else 0.0)
            case "noted":
                self._noted = True

    def _read_beat(self, now: float) -> None:
        beat = read_beat(self._beats)
        if beat is not None and beat.counter != self._beat.counter:
            self._beat_at = now
        if beat is not None:
            self._beat = beat

    def _ping(self, now: float) -> None:
        if self._process.code is not None:
            return
        beat = self._beat
        self._link.send(
            "ping",
            beats=beat.counter,
            step=beat.step,
            phase=int(beat.phase),
            idle=round(now - self._beat_at, 3),
            letter=self._process.letter(beat.counter > 0),
        )

    def _look_around(self) -> None:
        """Tells the reaper whom it would not find by itself."""
        for one in finder(os.getpid(), self._mark, (self._reaper.pid,)):
            if (one.pid, one.start) not in self._known:
                self._known.add((one.pid, one.start))
                self._reaper.tell("process", one.pid, one.start)

    def _send_stacks(self, now: float) -> None:
        if self._stacks_at is None or now < self._stacks_at:
            return
        self._stacks_at = None
        try:
            written = stacks_path(self._beats).read_text(encoding="utf-8", errors="replace")
        except OSError:
            written = ""
        self._link.send("stacks", frames=list(frames_of(written)[:_MOST_FRAMES]))

    def _judge_guard(self, now: float) -> None:
        """Ends the rank when the guard is gone. One that never answered is only complained about: training goes on."""
        silent = now - self._link.heard
        if not self._link.welcomed:
            if silent > _REFUSED_SECONDS and not self._complained:
                self._complained = True
                _say(f"rank {self._of.rank} on {self._of.host} cannot reach the guard and runs without it")
            return
        refused = self._link.refused is not None and now - self._link.refused > min(_REFUSED_SECONDS, self._stall)
        if (refused or silent > self._stall) and self._ending is None:
            self._guard_gone = True
            _say(f"the guard of rank {self._of.rank} on {self._of.host} is gone: ending the rank")
            self._begin_ending(now)

    def _begin_ending(self, now: float) -> None:
        if self._ending is None:
            keeper, mark, reaper = os.getpid(), self._mark, self._reaper.pid
            self._ending = Ending(lambda: finder(keeper, mark, (reaper,)), self._grace, now)

    def _tell_end(self, now: float) -> None:
        """The exit code and the last words, again on every new line; then whatever the rank has left is ended."""
        if not self._told_end:
            self._told_end = True
            failure = read_failure(self._beats) or {}
            self._link.send(
                "exit",
                code=self._process.code,
                step=self._beat.step,
                beats=self._beat.counter,
                **{name: text(failure, name) for name in ("exception", "message", "where") if name in failure},
            )
        self._begin_ending(now)


def _say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} megatron-ru keep: {sentence}", file=sys.stderr, flush=True)
