"""Ranks of `megatron-ru doctor --nodes auto` on this machine, each of which counts as a node."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from megatron_ru.foundation.ranks import free_port

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("OMPI_", "PMI", "SLURM_", "MV2_", "TORCHELASTIC_", "RU_")


def clean_environment(**extra):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith(LAUNCHERS)
    }
    # One thread each, and gloo by the loopback: nothing here leaves the machine.
    return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""} | extra


class Ranks:
    """`world_size` ranks, one to a node; their reports and exit codes."""

    def __init__(self, folder: Path, world_size: int, *words: str, environ=None, start=None):
        self.folder = folder
        port = str(free_port())
        self.processes = {}
        for rank in start if start is not None else range(world_size):
            places = {
                "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "megatron_ru", "doctor", "--nodes", "auto", "--json", "report.json", *words],
                cwd=folder, env=clean_environment(**places, **(environ or {}).get(rank, {})), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    def wait(self, *ranks: int, timeout: float = 120) -> dict[int, tuple[int, str, str]]:
        """(exit code, stdout, stderr) of these ranks, or of all."""
        end = time.monotonic() + timeout
        found = {}
        for rank in ranks or self.processes:
            process = self.processes[rank]
            out, err = process.communicate(timeout=end - time.monotonic())
            found[rank] = (process.returncode, out, err)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
