"""Ranks without a launcher: processes with exit codes of their own, and heartbeats as a keeper would give them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_ru.foundation.heartbeat import Beat, create_beat_file, read_beat, read_failure
from megatron_ru.foundation.ranks import free_port
from tests.training_runs import Trainer, clean_environment

OWN_ENTRY = (sys.executable, "-m", "megatron_ru.pretrain_gpt")


class RankProcesses:
    """The ranks of one run; leaving the block kills who is left."""

    def __init__(self, trainer: Trainer, ranks: int, *extra: str, name: str, steps: int = 20, heartbeats: bool = True,
                 command: tuple[str, ...] = OWN_ENTRY, environment: dict[str, str] | None = None):  # fmt: skip
        self.folder = trainer.folder / f"{name}_ranks"
        self.folder.mkdir(exist_ok=True)
        self.metrics = trainer.folder / f"{name}.jsonl"
        self.processes = []
        meeting = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port())}  # fmt: skip
        for rank in range(ranks):
            environ = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
            if heartbeats:
                create_beat_file(self.beat_file(rank))
                environ["RU_HEARTBEAT"] = str(self.beat_file(rank))
            words = [*command, *trainer.words(*extra, name=name, steps=steps)]
            environ = clean_environment(environ)
            with (self.folder / f"rank{rank}.log").open("w") as log:
                process = subprocess.Popen(
                    words, env=environ, cwd=trainer.folder, stdout=log, stderr=log, start_new_session=True
                )
            self.processes.append(process)

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def beat_file(self, rank: int) -> Path:
        """Where this rank beats."""
        return self.folder / f"rank{rank}.beat"

    def beat(self, rank: int) -> Beat:
        """The last beat of this rank."""
        beat = read_beat(self.beat_file(rank))
        assert beat is not None
        return beat

    def failure(self, rank: int) -> dict[str, str | int] | None:
        """What this rank said of the exception that ended it."""
        return read_failure(self.beat_file(rank))

    def log(self, rank: int) -> str:
        """What this rank wrote to its two streams."""
        return (self.folder / f"rank{rank}.log").read_text()

    def reach(self, step: int, seconds: float = 120) -> None:
        """Returns once every rank has done this step."""
        ranks = range(len(self.processes))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if all(self.beat(rank).step >= step for rank in ranks):
                return
            assert all(process.poll() is None for process in self.processes), self.log(0)[-3000:]
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached: {[self.beat(rank) for rank in ranks]}")

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to one rank alone."""
        os.kill(self.processes[rank].pid, number)

    def codes(self, seconds: float = 120) -> list[int]:
        """The exit codes of all ranks, once they have ended."""
        until = time.monotonic() + seconds
        return [process.wait(timeout=max(0.1, until - time.monotonic())) for process in self.processes]
