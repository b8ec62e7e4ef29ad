"""An all-reduce of two processes: its sum is checked, and its time is plausible."""

import subprocess
import sys

import pytest

from megatron_ru.doctor.all_reduce import bus_bandwidth
from megatron_ru.foundation.ranks import free_port
from tests.doctor.started import clean_environment

PROGRAM = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
from megatron_ru.doctor.all_reduce import measure_all_reduce
rank, port = int(sys.argv[1]), int(sys.argv[2])
if rank == 0:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
if rank == 1 and sys.argv[3] == "wrong":
    # Memory or a network card that changes a number on its way.
    true = dist.all_reduce
    dist.all_reduce = lambda tensor, *words, **more: (true(tensor, *words, **more), tensor[1:2].add_(1))
answer = measure_all_reduce(
    address="127.0.0.1", port=port, meeting="pair", rank=rank, ranks=2, backend="gloo", device=0, limit=30,
    seconds=0.2, size=2**20,
)
print(json.dumps(answer), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_two_processes(kind):
    import json

    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port, kind], env=clean_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        answers = [json.loads(process.stdout.readline()) for process in processes]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(30)
            process.stdout.close()
    assert [answer["right"] for answer in answers] == [True, kind == "right"]
    assert {answer["bytes"] for answer in answers} == {2**20}
    assert all(0 < answer["latency_seconds"] < 1 and 0 < answer["seconds"] < 10 for answer in answers)


@pytest.mark.parametrize(("ranks", "expected"), [(2, 1e9), (4, 1.5e9), (16, 1.875e9)])
def test_bus_bandwidth_counts_what_passes_a_link(ranks, expected):
    assert bus_bandwidth(ranks, 2 * 10**9, 2.0) == pytest.approx(expected)
