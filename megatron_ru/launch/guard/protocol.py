"""The words between guard and keepers: one JSON object to a line, over one TCP connection for each keeper."""

import json
import math
import socket
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ru.foundation.errors import UserError

Message = Mapping[str, Any]

GUARD_VARIABLE = "RU_GUARD"
"""`address:port:token` of the guard, in the environment of each keeper."""
JOB_VARIABLE = "RU_GUARD_JOB"
ATTEMPT_VARIABLE = "RU_ATTEMPT"

_LONGEST_LINE = 256 * 1024
_LONGEST_GREETING = 4 * 1024
_MOST_UNSENT = 1024 * 1024


@dataclass(frozen=True)
class GuardPlace:
    """Where a guard listens, and the word that it expects."""

    address: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{self.address}:{self.port}:{self.token}"

    @classmethod
    def parsed(cls, written: str) -> "GuardPlace":
        """The place in a value of RU_GUARD. Raises UserError for what is none."""
        address, _, rest = written.rpartition(":")[0].rpartition(":")
        token = written.rpartition(":")[2]
        if not (address and rest.isascii() and rest.isdigit() and 0 < int(rest) < 65536 and token):
            raise UserError(
                f"{GUARD_VARIABLE}={written!r} is no address:port:token: unset it, or use megatron-ru guard"
            )
        return cls(address, int(rest), token)


def encode(kind: str, fields: Message) -> bytes:
    """One line."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """The message in a line, None for what is none: anybody can connect and say anything."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("kind"), str) else None


def whole(message: Message, name: str, least: int = 0, most: int = 2**53, default: int = 0) -> int:
    """The whole number of that name, held between its bounds; `default` where there is none."""
    value = message.get(name)
    return min(max(value, least), most) if isinstance(value, int) and not isinstance(value, bool) else default


def seconds(message: Message, name: str) -> float:
    """The number of seconds of that name, 0 where there is none."""
    value = message.get(name)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(float(value), 0.0) if known and value is not None else 0.0


def text(message: Message, name: str, longest: int = 300) -> str:
    """The text of that name as one printable line, cut to `longest` characters; empty where there is none."""
    value = message.get(name)
    return one_line(value, longest) if isinstance(value, str) else ""


def one_line(written: str, longest: int = 300) -> str:
    """The text with blanks for what a terminal would obey, cut to `longest` characters."""
    shown = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in written[: 2 * longest])
    shown = " ".join(shown.split())
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


class Connection:
    """A socket that never blocks, cut into messages. `trusted` is for its owner to set, after the greeting."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.socket = sock
        self.trusted = False
        self.closed = False
        self._inbox = bytearray()
        self._outbox = bytearray()

    def send(self, kind: str, **fields: Any) -> None:
        """Says it, now or when the socket takes it; a peer that reads nothing is left."""
        if self.closed:
            return
        self._outbox += encode(kind, fields)
        if len(self._outbox) > _MOST_UNSENT:
            self.close()
        else:
            self.flush()

    @property
    def unsent(self) -> bool:
        """Whether something waits for the socket."""
        return bool(self._outbox) and not self.closed

    def flush(self) -> None:
        """Sends what the socket takes."""
        try:
            while self._outbox and not self.closed:
                del self._outbox[: self.socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def receive(self) -> list[Message]:
        """What has come. The connection is closed where the peer has left, or says what is no message."""
        try:
            while not self.closed:
                piece = self.socket.recv(65536)
                if not piece:
                    self.close()
                self._inbox += piece
                if len(self._inbox) > _LONGEST_LINE:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        return self._cut()

    def close(self) -> None:
        """Leaves."""
        if not self.closed:
            self.closed = True
            self.socket.close()

    def _cut(self) -> list[Message]:
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = bytearray(rest)
        found = [decode(bytes(line)) for line in lines]
        longest = _LONGEST_LINE if self.trusted else _LONGEST_GREETING
        if len(rest) > longest or None in found:
            self.close()
        return [message for message in found if message is not None]
