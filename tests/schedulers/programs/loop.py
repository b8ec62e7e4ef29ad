"""loop.py FOLDER STEPS [FAULT RANK STEP]: a training in small, an all-reduce a step and a checkpoint every fifth.

Rank 0 appends `step loss` to FOLDER/losses. In the first attempt FAULT comes on RANK before STEP: exit:N, kill, stop,
or hang (the rank stays out of the collective that the others are in); none of them leaves the driver to do something
when it sees the step. The time of the fault goes to FOLDER/fault. USR1 on any rank makes all of them save the same
step and end with code 75.
"""

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ru.foundation.heartbeat import Heartbeat, Phase

SECONDS_PER_STEP = 0.1
STEPS_PER_CHECKPOINT = 5
SAVED = 75


def main() -> None:
    heartbeat = Heartbeat.from_environment(os.environ)
    if heartbeat is not None:
        heartbeat.register_stacks()
        heartbeat.beat()
    try:
        train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or None, heartbeat)
    except Exception as error:
        if heartbeat is not None:
            heartbeat.failed(error)
        raise


def train(folder: Path, steps: int, fault: list[str] | None, heartbeat: Heartbeat | None) -> None:
    told: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    # An hour: what ends a hang is the guard, and never the library's own patience.
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
    rank, world = dist.get_rank(), dist.get_world_size()
    done, state = restored(folder)
    for step in range(done + 1, steps + 1):
        if fault is not None and int(fault[1]) == rank and int(fault[2]) == step and first_time(folder):
            strike(fault[0])
        shared = torch.tensor([float((rank + 1) * step % 7), float(len(told))])
        dist.all_reduce(shared)
        gradient, signals = shared.tolist()
        state = 0.9 * state + 0.1 * gradient / world
        if heartbeat is not None:
            heartbeat.beat(step, Phase.TRAINING)
        if rank == 0:
            with (folder / "losses").open("a") as log:
                log.write(f"{step} {state:.12f}\n")
            if step % STEPS_PER_CHECKPOINT == 0 or signals:
                saved = folder / "checkpoint.partial"
                saved.write_text(json.dumps([step, state]))
                saved.rename(folder / "checkpoint")
        if signals:
            if rank == 0:
                print(f"saved step {step} at a signal", flush=True)
            dist.barrier()
            dist.destroy_process_group()
            sys.exit(SAVED)
        time.sleep(SECONDS_PER_STEP)
    dist.barrier()
    dist.destroy_process_group()
    if heartbeat is not None:
        heartbeat.beat(phase=Phase.ENDED)


def restored(folder: Path) -> tuple[int, float]:
    try:
        step, state = json.loads((folder / "checkpoint").read_text())
    except FileNotFoundError:
        return 0, 1.0
    return step, state


def first_time(folder: Path) -> bool:
    """A fault comes once, whoever starts the program again."""
    try:
        with (folder / "fault").open("x") as log:
            log.write(f"{time.time()}\n")
    except FileExistsError:
        return False
    return True


def strike(kind: str) -> None:
    if kind.startswith("exit:"):
        os._exit(int(kind.removeprefix("exit:")))
    elif kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(3600)
    else:
        sys.exit(f"unknown fault {kind}")


if __name__ == "__main__":
    main()
