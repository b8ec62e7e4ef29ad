"""`ssh` between hosts of one machine: a client script on every host and a server outside of them.

A host cannot enter another one's namespaces, so the client hands its words and its three standard streams to the
server, which starts the command there. As with a real ssh the words become one line for a shell, the environment is
bare, a host without a link is an error 255, and ending the client does not end the command.
"""

import array
import json
import os
import select
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.schedulers.hosts import Hosts

_CLIENT = """#!/usr/bin/python3 -ISE
import array, json, os, socket, sys
words = sys.argv[1:]
while words and words[0].startswith("-"):
    option = words.pop(0)
    if option in ("-o", "-p", "-l", "-i", "-F"):
        words.pop(0)
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect("{address}")
request = json.dumps([os.uname().nodename, *words]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(request)
answer = server.recv(1)
os._exit(answer[0] if answer else 255)
"""


class RemoteShell:
    """The server, in threads of this process, and the client as `ssh` in the folder `bin`."""

    def __init__(self, hosts: "Hosts", bin: Path):
        self._hosts = hosts
        self._bin = bin
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Writes the client and begins to listen."""
        self._bin.mkdir(exist_ok=True)
        address = self._bin.parent / "ssh.socket"
        client = self._bin / "ssh"
        client.write_text(_CLIENT.replace("{address}", str(address)))
        client.chmod(0o755)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(address))
        self._socket.listen(64)
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def stop(self) -> None:
        """Takes no more requests."""
        if self._socket is not None:
            # close alone would leave the thread in accept.
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            length, streams = _receive_streams(client)
            try:
                request = b""
                while len(request) < length:
                    request += client.recv(length - len(request))
                origin, name, *words = json.loads(request)
                code = self._run(origin, name, words, streams, client)
            finally:
                for stream in streams:
                    os.close(stream)
            # The client may be gone, as an ssh that was killed.
            try:
                client.sendall(bytes([code]))
            except OSError:
                return

    def _run(self, origin: str, name: str, words: list[str], streams: list[int], client: socket.socket) -> int:
        hosts = self._hosts
        target = (
            name if name in hosts.names else next((host for host in hosts.names if name == hosts.address(host)), "")
        )
        if not target or not (hosts.is_reachable(origin) or origin == target) or not hosts.is_reachable(target):
            os.write(streams[2], f"ssh: connect to host {name} port 22: No route to host\n".encode())
            return 255
        command = ["bash", "-c", " ".join(words)]
        process: subprocess.Popen[bytes] = hosts.start(
            target, command, stdin=streams[0], stdout=streams[1], stderr=streams[2]
        )
        code = process.wait()
        # Nobody hears the end of a command on a host that is cut off, or that took the command with it.
        while not hosts.is_reachable(target) and not _closed(client):
            time.sleep(0.1)
        return 255 if code < 0 else code


def _closed(client: socket.socket) -> bool:
    readable, _, _ = select.select([client], [], [], 0)
    return bool(readable) and not client.recv(1, socket.MSG_PEEK)


def _receive_streams(client: socket.socket) -> tuple[int, list[int]]:
    streams = array.array("i")
    size = 3 * streams.itemsize
    length, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(size))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(data[: len(data) - len(data) % streams.itemsize])
    return int.from_bytes(length, "little"), list(streams)
