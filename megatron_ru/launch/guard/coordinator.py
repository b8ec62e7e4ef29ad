"""One attempt: the ranks of one start of the launcher, watched until nobody is left."""

import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_ru.launch.guard.protocol import Connection, Message, text, whole
from megatron_ru.launch.guard.ranks import Ranks
from megatron_ru.launch.guard.server import Server
from megatron_ru.launch.guard.signals import PASSED_ON, SignalBox
from megatron_ru.launch.guard.verdict import Limits, Verdict, judge, trouble

_LOOK_SECONDS = 0.1
_STACKS_SECONDS = 2.0
_OTHERS_SECONDS = 1.0
_LAUNCHER_GRACE = 5.0
_LAUNCHER_SECONDS = 3.0
_TIMES_TO_HURRY = 2
_KEEPERS_SECONDS = 4.0


class RunsLauncher(Protocol):
    """A launcher, here or under the guard of another node."""

    code: int | None

    def poll(self) -> int | None: ...

    def signal(self, number: int) -> None: ...

    def end(self, grace: float, now: float) -> bool: ...


class Attempt:
    """One attempt; `run` is called once."""

    def __init__(
        self,
        *,
        number: int,
        job: str,
        limits: Limits,
        server: Server,
        launchers: Sequence[RunsLauncher],
        signals: SignalBox,
        now: Callable[[], float],
        elsewhere: Callable[[Connection, Message | None], None] = lambda connection, message: None,
    ):
        """`elsewhere` takes what the guards of other nodes say."""
        self._number, self._job, self._limits = number, job, limits
        self._server, self._launchers, self._signals = server, launchers, signals
        self._clock, self._elsewhere = now, elsewhere
        self._ranks = Ranks()
        self._lines: dict[int, Connection] = {}
        self._speakers: dict[Connection, int] = {}
        self._begun = now()
        self._passed_on: list[int] = []
        self._kept_back: list[int] = []
        self._asked_to_end = 0
        self._complete_since: float | None = None

    def run(self) -> Verdict:
        """The verdict, once everything of this attempt that can be reached has ended."""
        what = self._until_it_ends()
        self._gather(what)
        verdict = judge(self._ranks, self._limits, self._now(), what=what, launcher=self._launcher_code())
        if verdict.code == 0 and self._in_a_hurry() and self._launcher_code() is None:
            asked = self._signals.first or signal.SIGTERM
            return Verdict(
                fault="ended", code=128 + asked, why=f"{asked.name} came again, so nobody waited for the ranks"
            )
        return verdict

    def finish(self) -> None:
        """Ends what is left of ranks and launchers."""
        grace = self._limits.grace
        for line in self._lines.values():
            line.send("stop")
        begun = self._now()
        begun_alone: float | None = None
        while True:
            self._listen()
            now = self._now()
            running = self._ranks.running
            reachable = any(one.cut is None and now - one.heard < self._limits.answer for one in running)
            codes = [launcher.poll() for launcher in self._launchers]
            if running or begun_alone is None:
                begun_alone = now
            # The launcher has something to say about ranks that have ended, and would rather end by itself.
            alone = not running and None in codes and now < begun_alone + _LAUNCHER_SECONDS
            patient = not self._in_a_hurry()
            if patient and (alone or (reachable and now < begun + grace + _OTHERS_SECONDS)):
                continue
            patience = 0.0 if self._in_a_hurry() else min(grace, _LAUNCHER_GRACE)
            # Every one of them, also when the first is not done yet.
            done = [launcher.end(patience, self._clock()) for launcher in self._launchers]
            if all(done):
                return

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._now()

    def _now(self) -> float:
        return self._clock() - self._begun

    def _until_it_ends(self) -> str | None:
        """Watches. The trouble that was found, `launcher` for one that does not end, None for one that has."""
        while True:
            self._listen()
            now = self._now()
            what = trouble(self._ranks, self._limits, now)
            if what is not None:
                return what
            codes = [launcher.poll() for launcher in self._launchers]
            if all(code is not None for code in codes) or any(codes):
                return None
            if not self._ranks.complete:
                self._complete_since = None
            elif self._complete_since is None:
                self._complete_since = now
            elif now - self._complete_since > self._limits.stall:
                return "launcher"
            if self._in_a_hurry():
                return None

    def _gather(self, what: str | None) -> None:
        """Waits for what the others have to say, since the first to be noticed need not be the culprit."""
        begun = self._now()
        if what in ("stall", "start"):
            for line in self._lines.values():
                line.send("stacks")
            patience = _STACKS_SECONDS
        elif what == "exit":
            patience = _OTHERS_SECONDS
        elif what is None:
            patience = self._limits.answer + _OTHERS_SECONDS
        else:
            return
        while self._now() - begun < patience and not self._in_a_hurry():
            self._listen()
            running = self._ranks.running
            if what in ("stall", "start"):
                asked = [one for one in running if one.cut is None and one.letter not in ("T", "t")]
                if all(one.frames is not None for one in asked):
                    return
            elif not running:
                return
            for launcher in self._launchers:
                launcher.poll()

    def _launcher_code(self) -> int | None:
        """The first launcher's code that is not 0; 0 when all have ended so; None when one of them runs on."""
        codes = [launcher.poll() for launcher in self._launchers]
        bad = [code for code in codes if code]
        return bad[0] if bad else None if None in codes else 0

    def _in_a_hurry(self) -> bool:
        return self._asked_to_end >= _TIMES_TO_HURRY

    def _listen(self) -> None:
        for connection, message in self._server.step(_LOOK_SECONDS, self._clock()):
            self._hear(connection, message)
        for number in self._signals.take(self._clock()):
            self._pass_on(number)
        self._pass_on_late()

    def _hear(self, connection: Connection, message: Message | None) -> None:
        kind = None if message is None else message["kind"]
        if kind == "hello" and message is not None:
            self._greet(connection, message)
            return
        rank = self._speakers.get(connection)
        if kind == "signalled" and message is not None:
            self._note_signal(whole(message, "number"), of_guard=rank is None)
        elif rank is None:
            self._elsewhere(connection, message)
        elif message is None:
            del self._speakers[connection]
            if self._lines.get(rank) is connection:
                del self._lines[rank]
                self._ranks.lost_line(rank, self._now())
        else:
            self._ranks.said(rank, message, self._now())
            connection.send("noted" if kind == "exit" else "pong")

    def _note_signal(self, number: int, *, of_guard: bool) -> None:
        """What the guard of another node got is as if this one had got it. What a scheduler has sent to the ranks has
        reached them; there is to be no other attempt. (TERM a launcher sends too, when it has lost a rank.)"""
        if of_guard and number in PASSED_ON:
            self._signals.put(number)
        elif number in (signal.SIGUSR1, signal.SIGUSR2):
            self._signals.first = self._signals.first or signal.Signals(number)

    def _greet(self, connection: Connection, message: Message) -> None:
        if whole(message, "attempt") != self._number or text(message, "job") != self._job:
            connection.send("welcome", stall=self._limits.stall, grace=self._limits.grace, pause=self._limits.pause)
            connection.send("stop")
            return
        rank = self._ranks.greeted(message, self._now())
        self._lines[rank] = connection
        self._speakers[connection] = rank
        limits = self._limits
        connection.send("welcome", stall=limits.stall, grace=limits.grace, pause=limits.pause)
        for number in self._passed_on:
            connection.send("signal", number=number)

    def _pass_on(self, number: int) -> None:
        """To the ranks by their keepers, so that the launcher does not kill who is saving; to it when there are none.

        A second request to end is taken as an order.
        """
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._asked_to_end += 1
        self._passed_on.append(int(number))
        for line in self._lines.values():
            line.send("signal", number=int(number))
        if not self._ranks.seen:
            self._kept_back.append(int(number))

    def _pass_on_late(self) -> None:
        """Keepers may be on their way when a signal comes, and then it is for them; else the launcher gets it."""
        if self._kept_back and not self._ranks.seen and self._now() > _KEEPERS_SECONDS:
            for number in self._kept_back:
                for launcher in self._launchers:
                    launcher.signal(number)
        if self._ranks.seen or self._now() > _KEEPERS_SECONDS:
            self._kept_back.clear()
