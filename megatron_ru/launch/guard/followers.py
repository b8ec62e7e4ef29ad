"""The guards of further nodes, where each node has a launcher of its own: what the first guard knows of them."""

from collections.abc import Callable, Mapping

from megatron_ru.foundation.errors import TRY_AGAIN
from megatron_ru.launch.guard.protocol import Connection, Message, whole
from megatron_ru.launch.guard.report import say
from megatron_ru.launch.guard.verdict import Limits

# What differs between attempts and is for the first guard to say.
TOLD = ("MASTER_PORT", "RU_GUARD", "RU_GUARD_JOB", "RU_ATTEMPT")


class RemoteLauncher:
    """The launcher of one further node, as its guard tells of it."""

    def __init__(self, followers: "Followers", node: int):
        self.code: int | None = None
        self._followers, self._node = followers, node
        self._told_end: float | None = None

    def poll(self) -> int | None:
        """The exit code once that node has told it; 75 once its guard does not answer any more."""
        if self.code is None and self._followers.lost(self._node):
            say(f"the guard of node {self._node} does not answer")
            self.code = TRY_AGAIN
        return self.code

    def signal(self, number: int) -> None:
        """Has the signal sent to that launcher."""
        self._followers.send(self._node, "signal", number=int(number))

    def end(self, grace: float, now: float) -> bool:
        """Has it ended there. A node that does not answer is left to end by itself, once it misses this guard."""
        if self._told_end is None:
            self._told_end = now
            self._followers.send(self._node, "end_launcher", grace=grace)
        patience = grace + 5.0
        return self.code is not None or now - self._told_end > patience


class Followers:
    """All of them; they may come late, and call again after a cut."""

    def __init__(self, count: int, limits: Limits, now: Callable[[], float]):
        self._count, self._limits, self._now = count, limits, now
        self._heard: dict[int, float] = {}
        self._cut: dict[int, float] = {}
        self._lines: dict[int, Connection] = {}
        self._launchers: dict[int, RemoteLauncher] = {}
        self._order: dict[str, str] = {}
        self._attempt = -1

    def start(self, attempt: int, environ: Mapping[str, str]) -> list[RemoteLauncher]:
        """Has the launchers of an attempt started, wherever a guard is there, and elsewhere when it comes."""
        self._attempt = attempt
        self._order = {name: environ[name] for name in TOLD if name in environ}
        self._launchers = {node: RemoteLauncher(self, node) for node in range(1, self._count + 1)}
        for node in list(self._lines):
            self._send_order(node)
        return list(self._launchers.values())

    def hear(self, connection: Connection, message: Message | None) -> None:
        """Notes what the guard of another node says."""
        if message is None:
            for node in [node for node, line in self._lines.items() if line is connection]:
                del self._lines[node]
                self._cut[node] = self._now()
            return
        if message["kind"] == "follow":
            node = whole(message, "node")
            if not 1 <= node <= self._count:
                connection.send("dismissed", code=2, why=f"node {node} is not between 1 and {self._count}")
                return
            self._lines[node] = connection
            self._cut.pop(node, None)
            connection.send("pong")
            if whole(message, "attempt", least=-1, default=-1) != self._attempt:
                self._send_order(node)
        speaker = next((node for node, line in self._lines.items() if line is connection), None)
        if speaker is None:
            return
        self._heard[speaker] = self._now()
        if whole(message, "attempt", least=-1, default=-1) == self._attempt and "code" in message:
            self._launchers[speaker].code = whole(message, "code", most=255)
        connection.send("pong")

    def send(self, node: int, kind: str, **fields: int | float | str) -> None:
        """Says it to that node if there is a line."""
        if node in self._lines:
            self._lines[node].send(kind, **fields)

    def lost(self, node: int) -> bool:
        """Whether that guard has come and then gone."""
        now = self._now()
        silent = node in self._heard and now - self._heard[node] > self._limits.stall
        return silent or (node in self._cut and now - self._cut[node] > self._limits.cut)

    def dismiss(self, code: int) -> None:
        """Tells all of them how the job ended."""
        for node in self._lines:
            self.send(node, "dismissed", code=code)

    def _send_order(self, node: int) -> None:
        if self._attempt >= 0:
            self._lines[node].send("start", attempt=self._attempt, environ=self._order)
