"""The doctor's hold on the process that measures."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any


class Worker:
    """A process of `worker`, started when there is something to ask and again after it had to be killed.

    To be used by the main thread: the kernel ends the worker with the thread that started it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer, or {"error": why there is none} after at most `limit` seconds."""
        self.send(request)
        return self.answer(limit)

    def send(self, request: dict[str, Any]) -> None:
        """Hands on a request; `answer` has to follow before the next one."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died; `answer` says how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, limit: float) -> dict[str, Any]:
        """The answer to the last request, or {"error": …}, and then the next request meets a new process."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        end = time.monotonic() + limit
        while b"\n" not in self._heard:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.kill()
                return {"error": f"no answer within {limit:.0f} s"}
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                code = process.wait()
                self.kill()
                how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
                return {"error": f"the measuring process ended with {how}{self._last_complaint()}"}
            self._heard += chunk
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """Ends the process. One that hangs inside the kernel is left to it."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        self._process, self._heard = None, b""

    def _start(self) -> None:
        self.kill()
        self._complaints.seek(0)
        self._complaints.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_ru.doctor.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,
        )

    def _last_complaint(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""
