"""A keeper's line to the guard, which is taken up again after every cut."""

import errno
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from megatron_ru.launch.guard.protocol import Connection, GuardPlace, Message

_PAUSE_SECONDS = 0.5
_CONNECT_SECONDS = 5.0


class GuardLink:
    """Connects, greets, and connects again. Nothing here blocks or raises."""

    def __init__(self, place: GuardPlace, greeting: Callable[[], Mapping[str, Any]], kind: str, now: float):
        self._place, self._greeting, self._kind = place, greeting, kind
        self._socket: socket.socket | None = None
        self._connection: Connection | None = None
        self._next_try, self._give_up_at = now, 0.0
        self.heard = now
        """When the guard last said something."""
        self.refused: float | None = None
        """Since when its host answers that nobody listens there, None when it does not say so."""
        self.welcomed = False
        """Whether the guard has ever answered."""

    def fileno(self) -> int:
        """The socket's number, -1 without one."""
        if self._connection is not None:
            return self._connection.socket.fileno()
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def writes(self) -> bool:
        """Whether to wait until the socket takes something."""
        return self._socket is not None or (self._connection is not None and self._connection.unsent)

    def step(self, now: float) -> list[Message]:
        """Goes on connecting, sends and receives; what the guard has said."""
        if self._connection is None:
            self._connect(now)
        if self._connection is None:
            return []
        self._connection.flush()
        messages = self._connection.receive()
        if messages:
            self.heard, self.refused, self.welcomed = now, None, True
        if self._connection.closed:
            self._connection = None
            self._next_try = now + (_PAUSE_SECONDS if messages else 0.1)
        return messages

    def send(self, kind: str, **fields: Any) -> None:
        """Says it if there is a line."""
        if self._connection is not None:
            self._connection.send(kind, **fields)

    def close(self) -> None:
        """Hangs up."""
        for held in (self._connection, self._socket):
            if held is not None:
                held.close()
        self._connection = self._socket = None

    def _connect(self, now: float) -> None:
        if self._socket is None:
            if now < self._next_try:
                return
            self._next_try = now + _PAUSE_SECONDS
            self._give_up_at = now + _CONNECT_SECONDS
            try:
                family, kind, number, _, address = socket.getaddrinfo(
                    self._place.address, self._place.port, type=socket.SOCK_STREAM
                )[0]
                self._socket = socket.socket(family, kind | socket.SOCK_CLOEXEC, number)
                self._socket.setblocking(False)
                answer = self._socket.connect_ex(address)
            except OSError:
                self._drop_socket()
                return
            if answer not in (0, errno.EINPROGRESS):
                self._failed(answer, now)
                return
        self._finish(now)

    def _finish(self, now: float) -> None:
        sock = self._socket
        assert sock is not None
        answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if answer:
            self._failed(answer, now)
            return
        try:
            sock.getpeername()
        except OSError:
            if now > self._give_up_at:
                self._drop_socket()
            return
        # The kernel connects a socket to itself when the port it takes is the one it calls.
        if sock.getsockname() == sock.getpeername():
            self._failed(errno.ECONNREFUSED, now)
            return
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = None
        self._connection = Connection(sock)
        self._connection.trusted = True
        self._connection.send(self._kind, token=self._place.token, pid=os.getpid(), **self._greeting())

    def _failed(self, answer: int, now: float) -> None:
        if answer == errno.ECONNREFUSED:
            self.refused = now if self.refused is None else self.refused
        self._drop_socket()

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
