"""What a guard costs each step: one beat, and the question whether a signal came. `pytest -s` prints the figures."""

import json
import os
import subprocess
import sys

import pytest

from megatron_ru.foundation.heartbeat import create_beat_file
from megatron_ru.foundation.ranks import free_port
from tests.training_runs import clean_environment

STEP_SECONDS = 0.1
STEPS = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import torch.distributed as dist
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron_ru.foundation.heartbeat import Heartbeat, Phase
from megatron_ru.plugin.signal_agreement import Agreement

dist.init_process_group("gloo")
beats = Heartbeat.from_environment(os.environ)
agreement, megatrons = Agreement(), DistributedSignalHandler().__enter__()
taken = {"beat": [], "ours": [], "megatron": []}
calls = {"beat": lambda: beats.beat(1, Phase.TRAINING), "ours": lambda: agreement.ask(0),
         "megatron": megatrons.signals_received}
for _ in range(int(sys.argv[1])):
    for name, call in calls.items():
        time.sleep(float(sys.argv[2]) / len(calls) - 0.005)
        # A core that comes out of its sleep is slow; one that trains has not slept.
        awake = time.perf_counter()
        while time.perf_counter() < awake + 0.005:
            pass
        since = time.perf_counter()
        call()
        taken[name].append(time.perf_counter() - since)
agreement.settle()
print("taken", json.dumps(taken))
dist.barrier()
dist.destroy_process_group()
"""


def mean(times):
    """Without the slowest tenth, in which another process had the core."""
    kept = sorted(times)[: -len(times) // 10]
    return sum(kept) / len(kept)


@pytest.mark.slow
def test_beat_and_question_take_less_than_a_thousandth_of_a_step(tmp_path):
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", STEPS, "200", str(STEP_SECONDS)]
    processes = []
    for rank in range(2):
        create_beat_file(tmp_path / f"rank{rank}")
        environ = clean_environment({**meeting, "RANK": str(rank), "RU_HEARTBEAT": str(tmp_path / f"rank{rank}")})
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    taken = json.loads(outputs[0].partition("taken ")[2].splitlines()[0])
    means = {name: mean(times) for name, times in taken.items()}
    for name, seconds in means.items():
        print(f"{name}: {seconds * 1e6:.1f} µs a step, {seconds / STEP_SECONDS:.4%} of {STEP_SECONDS * 1e3:.0f} ms")
    ours = means["beat"] + means["ours"]
    assert ours < means["megatron"] / 3
    # Where other processes want the cores, the figure is theirs.
    if os.getloadavg()[0] < os.cpu_count():
        assert ours < STEP_SECONDS / 1000
