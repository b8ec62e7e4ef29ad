"""The socket on which a guard listens, and the lines of those who know its word."""

import hmac
import resource
import selectors
import socket
from collections.abc import Iterator

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.guard.protocol import Connection, GuardPlace, Message, text

_GREETING_SECONDS = 10.0
_BACKLOG = 4096


class Server:
    """Listens from the moment it is made. Raises UserError where it cannot."""

    def __init__(self, address: str, port: int, token: str):
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[Connection, float] = {}
        self._known: set[Connection] = set()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.socket(family, socket.SOCK_STREAM)
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Other hosts may reach this one by another of its addresses than the one that it would bind.
        own = address if address in ("127.0.0.1", "::1", "localhost") else ""
        try:
            self._listening.bind((own, port))
            self._listening.listen(_BACKLOG)
        except OSError as error:
            raise UserError(
                f"the guard cannot listen on port {port} ({error.strerror}): is another one running here? "
                "Give another port"
            ) from error
        # A line for each rank. What the launcher starts keeps the limit that it would have had.
        least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else max(least, 65536), most)
        )
        self._listening.setblocking(False)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self.place = GuardPlace(address, self._listening.getsockname()[1], token)

    def step(self, patience: float, now: float) -> Iterator[tuple[Connection, Message | None]]:
        """Waits for at most `patience` seconds, then gives what was said, and None for a line that was cut."""
        for connection in self._known:
            self._watch(connection)
        for key, mask in self._selector.select(patience):
            if key.fileobj is self._listening:
                self._accept(now)
                continue
            connection = key.data
            if mask & selectors.EVENT_WRITE:
                connection.flush()
            if mask & selectors.EVENT_READ:
                yield from self._read(connection)
        for connection, since in list(self._strangers.items()):
            if now - since > _GREETING_SECONDS:
                self._leave(connection)
        for connection in [one for one in self._known if one.closed]:
            self._leave(connection)
            yield connection, None

    def close(self) -> None:
        """Hangs up on everybody."""
        for connection in [*self._strangers, *self._known]:
            connection.flush()
            connection.close()
        self._selector.close()
        self._listening.close()

    def _accept(self, now: float) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(sock)
            self._strangers[connection] = now
            self._selector.register(sock, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> Iterator[tuple[Connection, Message | None]]:
        # A closed socket has no number by which it could be taken out.
        number = connection.socket.fileno()
        for message in connection.receive():
            if not connection.trusted:
                if not hmac.compare_digest(text(message, "token").encode(), self.place.token.encode()):
                    self._forget(number)
                    self._leave(connection)
                    return
                connection.trusted = True
                self._strangers.pop(connection, None)
                self._known.add(connection)
            yield connection, message
        if connection.closed:
            self._forget(number)
            if connection in self._strangers:
                self._leave(connection)

    def _watch(self, connection: Connection) -> None:
        if connection.closed:
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        if self._selector.get_key(connection.socket).events != events:
            self._selector.modify(connection.socket, events, connection)

    def _forget(self, number: int) -> None:
        try:
            self._selector.unregister(number)
        except (KeyError, ValueError, OSError):
            return

    def _leave(self, connection: Connection) -> None:
        if not connection.closed:
            self._forget(connection.socket.fileno())
            connection.close()
        self._strangers.pop(connection, None)
        self._known.discard(connection)
