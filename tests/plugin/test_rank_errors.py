"""Who says that the input is bad, and who leaves without waiting for anybody."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.heartbeat import create_beat_file, read_failure
from megatron_ru.plugin import rank_errors
from megatron_ru.plugin.rank_errors import exit_code_of, meet_ranks, refused_by_megatron


def fail():
    raise UserError("a is 3, expected 2")


@pytest.fixture(autouse=True)
def ranks_have_not_met(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)


def met(monkeypatch):
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    codes = []
    monkeypatch.setattr(rank_errors.os, "_exit", codes.append)
    return codes


def test_nothing_to_say(capsys):
    ran = []
    assert exit_code_of(lambda: ran.append(1), "megatron-ru pretrain_gpt") == 0
    assert ran == [1]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("1", False), ("3", False)])
def test_the_first_rank_of_a_host_speaks_for_all(monkeypatch, capsys, rank, said):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    waited = []
    monkeypatch.setattr(rank_errors.time, "sleep", waited.append)
    assert exit_code_of(fail, "megatron-ru pretrain_gpt") == 2
    assert capsys.readouterr().err == ("megatron-ru pretrain_gpt: error: a is 3, expected 2\n" if said else "")
    assert waited == ([] if said else [2.0]), "who is silent must not leave before the one that speaks"


def test_a_rank_whose_environment_is_at_fault_speaks_for_itself(monkeypatch, capsys):
    def environment_at_fault(environ):
        fail()

    monkeypatch.setattr(rank_errors, "ensure_rendezvous", environment_at_fault)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert exit_code_of(meet_ranks, "megatron-ru pretrain_gpt") == 2
    assert capsys.readouterr().err == "megatron-ru pretrain_gpt: error: a is 3, expected 2\n"


def test_once_they_have_met_each_rank_speaks_for_itself(monkeypatch, capsys):
    codes = met(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")
    assert exit_code_of(fail, "megatron-ru run_host") == 2
    assert capsys.readouterr().err == "megatron-ru run_host: error: rank 5: a is 3, expected 2\n"
    assert codes == [2], "the others wait for this rank, so it does not wait for them"


def test_the_keeper_hears_of_it(monkeypatch):
    told = []
    monkeypatch.setattr(rank_errors, "tell_failure", told.append)
    assert exit_code_of(fail, "megatron-ru") == 2
    assert [str(error) for error in told] == ["a is 3, expected 2"]


# A rank whose interpreter cannot end by itself: a thread that Python waits for, as a process group's destructor would.
RANK = """
import multiprocessing, os, sys, threading, time, types
from megatron_ru.plugin import heartbeats
from megatron_ru.plugin.rank_errors import end_on_failure
sys.modules["torch.distributed"] = types.SimpleNamespace(
    is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: int(sys.argv[1])
)
end_on_failure()
end_on_failure()
heartbeats.open_heartbeat(os.environ)
if sys.argv[1] != "1":
    threading.Thread(target=time.sleep, args=(3600,)).start()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    child.start()
    print(child.pid)
print("unflushed words")
raise ArithmeticError("the loss is nan")
"""


@pytest.mark.parametrize("ranks", ["2", "1"])
def test_an_exception_ends_the_rank_at_once_and_is_told(tmp_path, ranks):
    create_beat_file(tmp_path / "rank1")
    environment = {**os.environ, "RU_HEARTBEAT": str(tmp_path / "rank1"), "RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANK, ranks], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    *children, words = done.stdout.splitlines()
    assert words == "unflushed words"
    assert done.stderr.count("ArithmeticError: the loss is nan") == 1
    assert read_failure(tmp_path / "rank1")["message"] == "the loss is nan"
    assert len(children) == int(ranks) - 1
    # A process that was killed is gone a moment later.
    until = time.monotonic() + 5
    while any(is_alive(int(child)) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_alive(int(child)) for child in children)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0, "megatron-ru")


def test_what_megatron_refuses():
    assert str(refused_by_megatron(AssertionError("two\n   lines"))) == "Megatron refuses these arguments: two lines"
    try:
        layers = 3
        assert layers % 2 == 0
    except AssertionError as error:
        # pytest writes a message of its own into asserts; Megatron's have none.
        bare = AssertionError().with_traceback(error.__traceback__)
    assert (
        str(refused_by_megatron(bare)) == "Megatron refuses these arguments: its check `assert layers % 2 == 0` failed"
    )
