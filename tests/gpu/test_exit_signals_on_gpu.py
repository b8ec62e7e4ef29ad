"""On a GPU neither the host nor the training's stream waits for the question whether a signal came."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from megatron_ru.foundation.ranks import free_port
from tests.distributed.rank_processes import RankProcesses
from tests.training_runs import clean_environment

pytestmark = pytest.mark.gpu

QUESTIONS = """
import json, time
import torch, torch.distributed as dist
from megatron_ru.plugin.signal_agreement import _NcclQuestion
torch.cuda.set_device(0)
dist.init_process_group("nccl")
question = _NcclQuestion()
question.put(0, 0)
question.answer()
left = torch.randn(8192, 8192, device="cuda")
torch.cuda.synchronize()
for _ in range(60):
    left @ left
since = time.perf_counter()
question.put(7, 12)
asked = time.perf_counter() - since
answer = question.answer()
busy = not torch.cuda.current_stream().query()
torch.cuda.synchronize()
whole = time.perf_counter() - since
print("found", json.dumps({"answer": answer, "asked": asked, "busy": busy, "whole": whole}))
dist.destroy_process_group()
"""


def test_the_answer_comes_while_the_gpu_is_busy_with_training():
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS], env=clean_environment(meeting), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("found ")[2])
    assert found["answer"] == [7, 12]
    assert found["busy"], "the products were done before the answer: more of them are needed to see anything"
    assert found["asked"] < found["whole"] / 10


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_saves_and_the_resumed_run_has_the_losses_of_an_uninterrupted_one(trainer, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip("one CUDA device, this needs two")
    layout = ("--device", "cuda", "--tensor-model-parallel-size", str(ranks))
    whole = trainer.run(ranks, *layout, name=f"gpu_never_signalled_{ranks}", steps=60)
    whole.assert_trained(range(1, 61))
    save = trainer.folder / f"gpu_signalled_{ranks}"
    flags = (*layout, "--save", str(save), "--save-interval", "100")
    with RankProcesses(trainer, ranks, *flags, name=f"gpu_left_{ranks}", steps=60) as left:
        left.reach(6)
        left.signal(ranks - 1, signal.SIGUSR1)
        assert left.codes() == [75] * ranks, left.log(0)[-3000:]
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    resumed = trainer.run(ranks, *flags, "--load", str(save), name=f"gpu_resumed_{ranks}", steps=60)
    resumed.assert_trained(range(saved + 1, 61))
    assert max(abs(resumed.losses[step] / whole.losses[step] - 1) for step in resumed.losses) < 1e-6
