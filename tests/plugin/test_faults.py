"""Faults strike who was named, when it was named, and a wrong value is told in one sentence."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.faults import Fault, fault_seams, faults_of

STRIKE = "import os; from megatron_ru.plugin.faults import faults_of; faults_of(os.environ)[0].strike(); print('alive')"


def faults(value, **environ):
    return faults_of({"MEGATRON_RU_FAULT": value, **environ})


def test_without_the_variable_nothing_is_replaced():
    assert faults_of({}) == []
    assert faults("") == []
    assert fault_seams([]) == []


def test_only_the_named_rank_in_the_named_attempt():
    value = "exit:7,rank=2,step=5; kill,step=9,rank=2,attempt=1 ;hang,rank=0,step=1,attempt=any"
    first = Fault(kind="exit", code=7, rank=2, step=5, attempt=0)
    assert faults(value, RANK="2") == [first]
    assert faults(value, RANK="2", RU_ATTEMPT="1") == [Fault(kind="kill", rank=2, step=9, attempt=1)]
    assert faults(value, RANK="1") == []
    always = [Fault(kind="hang", rank=0, step=1, attempt=None)]
    assert faults(value) == faults(value, RANK="0", RU_ATTEMPT="3") == always


@pytest.mark.parametrize(
    "value",
    ["explode,rank=1,step=2", "kill", "kill,rank=1", "kill,rank=x,step=2", "kill:9,rank=1,step=2", "exit,rank=1,step=2",
     "exit:256,rank=1,step=2", "exit:-1,rank=0,step=2", "kill,rank=1,step=2,host=a", "kill,rank=1,step=2,attempt=-1"],
)  # fmt: skip
def test_a_wrong_value(value):
    with pytest.raises(UserError) as raised:
        faults(value)
    assert str(raised.value) == (
        f"MEGATRON_RU_FAULT={value!r} is not a fault, expected exit:N, kill, stop, hang or raise, followed by "
        "rank=R,step=S[,attempt=A]; for instance kill,rank=1,step=5"
    )


@pytest.mark.parametrize(("kind", "code"), [("exit:7", 7), ("exit:0", 0), ("kill", -signal.SIGKILL), ("raise", 1)])
def test_how_it_ends(kind, code):
    environment = {**os.environ, "MEGATRON_RU_FAULT": f"{kind},rank=0,step=3", "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", STRIKE], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout == ""
    assert f"MEGATRON_RU_FAULT: {kind.partition(':')[0]} on rank 0 before step 3" in done.stderr


@pytest.mark.parametrize(("kind", "state"), [("stop", "T"), ("hang", "S")])
def test_who_does_not_end(kind, state):
    environment = {**os.environ, "MEGATRON_RU_FAULT": f"{kind},rank=0,step=3", "RANK": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", STRIKE], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stderr.readline()
            until = time.monotonic() + 20
            while process_state(process.pid) != state and time.monotonic() < until:
                time.sleep(0.01)
            assert process_state(process.pid) == state
            assert process.poll() is None
        finally:
            process.kill()


def process_state(pid):
    with open(f"/proc/{pid}/stat") as stream:
        return stream.read().rpartition(")")[2].split()[0]


def test_it_strikes_before_the_step(monkeypatch):
    args = SimpleNamespace(curr_iteration=0)
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(get_args=lambda: args))
    done = []

    def train_step(*arguments):
        done.append(args.curr_iteration + 1)

    (seam,) = fault_seams([Fault(kind="raise", rank=0, step=3)])
    step = seam.make(train_step)
    for args.curr_iteration in range(2):
        step()
    args.curr_iteration = 2
    with pytest.raises(RuntimeError, match="before step 3"):
        step()
    assert done == [1, 2]
