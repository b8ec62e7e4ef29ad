"""A job under guard: attempt after attempt, until one goes well or there is nothing to be gained by another."""

import secrets
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ru.launch.guard.clock import WatchClock
from megatron_ru.launch.guard.coordinator import Attempt, RunsLauncher
from megatron_ru.launch.guard.followers import Followers
from megatron_ru.launch.guard.hosts import Hosts
from megatron_ru.launch.guard.launcher import Launcher, port_of_attempt
from megatron_ru.launch.guard.protocol import ATTEMPT_VARIABLE, GUARD_VARIABLE, JOB_VARIABLE
from megatron_ru.launch.guard.report import append, record, say, sentences
from megatron_ru.launch.guard.retries import Retry, after, code_of
from megatron_ru.launch.guard.server import Server
from megatron_ru.launch.guard.signals import SignalBox
from megatron_ru.launch.guard.verdict import Limits, Verdict


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """How to guard."""

    limits: Limits = field(default_factory=Limits)
    retries: int = 0
    """Attempts that may follow the first."""
    back_off: float = 5.0
    """Seconds before the first of them; twice as many before each further one."""
    report: str | None = None
    """File that gets a JSON line for each attempt."""
    job: str = ""
    """What to call the job."""
    address: str = "127.0.0.1"
    """Where keepers reach this guard."""
    port: int = 0
    """Its port, 0 for any."""
    token: str = ""
    """The word that keepers have to know; empty for one that nobody can guess."""
    nodes: int = 1
    """Guards that start a launcher each; this is the first of them."""
    spares: int = 0
    """Hosts beyond those that an attempt needs."""
    hostfile: str | None = None
    """The file that names the hosts to the launcher, when some of them are spare."""
    signal_after: tuple[str, float] | None = None
    """A signal that this guard gives itself after so many seconds, for schedulers that send none."""


def guard(words: Sequence[str], settings: GuardSettings, environ: Mapping[str, str]) -> int:
    """Runs the launcher and returns the job's exit code. Raises UserError for settings that cannot be honoured."""
    hosts = Hosts(words, settings.spares, settings.hostfile)
    server = Server(settings.address, settings.port, settings.token or secrets.token_hex(16))
    signals = SignalBox()
    try:
        with signals.listening():
            return _Session(words, settings, environ, hosts, server, signals).run()
    finally:
        server.close()


class _Session:
    def __init__(
        self,
        words: Sequence[str],
        settings: GuardSettings,
        environ: Mapping[str, str],
        hosts: Hosts,
        server: Server,
        signals: SignalBox,
    ):
        self._words, self._settings, self._environ = words, settings, environ
        self._hosts, self._server, self._signals = hosts, server, signals
        # Nobody else may take a keeper of another job for one of this.
        self._job = settings.job or f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._watch = WatchClock()
        self._signal_at = None if settings.signal_after is None else settings.signal_after[1]
        self._followers = Followers(settings.nodes - 1, settings.limits, self._now)

    def run(self) -> int:
        verdicts: list[Verdict] = []
        left_out: tuple[str, ...] = ()
        while True:
            verdict, seconds = self._attempt(len(verdicts), left_out)
            verdicts.append(verdict)
            retry = self._what_follows(verdicts)
            self._tell(len(verdicts) - 1, seconds, verdict, retry)
            left_out = retry.left_out
            if not retry.again or not self._rest(retry.pause):
                code = code_of(verdicts)
                self._followers.dismiss(code)
                return code

    def _attempt(self, number: int, left_out: Sequence[str]) -> tuple[Verdict, float]:
        environ = self._environment(number)
        launcher = Launcher(self._hosts.words_without(left_out), environ)
        launchers: list[RunsLauncher] = [launcher, *self._followers.start(number, environ)]
        attempt = Attempt(
            number=number,
            job=self._job,
            limits=self._settings.limits,
            server=self._server,
            launchers=launchers,
            signals=self._signals,
            now=self._now,
            elsewhere=self._followers.hear,
        )
        verdict = attempt.run()
        seconds = attempt.seconds
        attempt.finish()
        return verdict, seconds

    def _environment(self, number: int) -> dict[str, str]:
        address = self._environ.get("MASTER_ADDR", "")
        port = port_of_attempt(self._environ.get("MASTER_PORT"), number, address, [self._server.place.port])
        return {
            **self._environ,
            **({} if port is None else {"MASTER_PORT": port}),
            GUARD_VARIABLE: str(self._server.place),
            JOB_VARIABLE: self._job,
            ATTEMPT_VARIABLE: str(number),
        }

    def _what_follows(self, verdicts: Sequence[Verdict]) -> Retry:
        asked = self._signals.first
        return after(
            verdicts,
            most=self._settings.retries,
            back_off=self._settings.back_off,
            spares=self._settings.spares,
            fixed=socket.gethostname(),
            signalled="" if asked is None else asked.name,
        )

    def _tell(self, number: int, seconds: float, verdict: Verdict, retry: Retry) -> None:
        for line in sentences(number, seconds, verdict, retry):
            say(line)
        if self._settings.report is not None:
            append(self._settings.report, record(self._job, number, seconds, verdict, retry))

    def _rest(self, pause: float) -> bool:
        """Waits before the next attempt; False when somebody asked for an end meanwhile."""
        until = self._now() + pause
        while self._now() < until:
            for connection, message in self._server.step(0.1, self._now()):
                if message is not None and message["kind"] == "hello":
                    connection.send("stop")
                else:
                    self._followers.hear(connection, message)
            if self._signals.take(self._now()):
                say(f"{self._signals.first.name if self._signals.first else 'a signal'}: no other attempt")
                return False
        return True

    def _now(self) -> float:
        now = self._watch.now()
        if self._signal_at is not None and self._settings.signal_after is not None and now >= self._signal_at:
            self._signal_at = None
            self._signals.put(signal.Signals[f"SIG{self._settings.signal_after[0]}"])
        return now
