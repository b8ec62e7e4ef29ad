"""The heartbeat file: what a rank writes is what its keeper reads, and nothing on the way can stop the training."""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from megatron_ru.foundation import heartbeat
from megatron_ru.foundation.heartbeat import Beat, Heartbeat, Phase, create_beat_file, read_beat, read_failure


@pytest.fixture
def path(tmp_path):
    create_beat_file(tmp_path / "rank3")
    return tmp_path / "rank3"


@pytest.fixture
def beats(path):
    opened = Heartbeat.from_environment({"RU_HEARTBEAT": str(path)})
    yield opened
    opened.close()


def raised():
    try:
        return 1 / 0
    except ZeroDivisionError as error:
        return error


def test_the_bytes_of_the_contract(path, beats):
    assert path.read_bytes() == b"RUBEAT01" + struct.pack("<qqq", 0, -1, 0) + bytes(32)
    beats.beat(41, Phase.TRAINING)
    beats.beat(42, Phase.SAVING)
    assert path.read_bytes() == b"RUBEAT01" + struct.pack("<qqq", 2, 42, 3) + bytes(32)


def test_what_is_not_given_stays(path, beats):
    assert read_beat(path) == Beat(0, -1, Phase.STARTING)
    beats.beat()
    assert read_beat(path) == Beat(1, -1, Phase.STARTING)
    beats.beat(7, Phase.TRAINING)
    beats.beat(phase=Phase.EVALUATING)
    assert read_beat(path) == Beat(3, 7, Phase.EVALUATING)


def test_without_the_variable_there_is_none():
    assert Heartbeat.from_environment({}) is None
    assert Heartbeat.from_environment({"RU_HEARTBEAT": ""}) is None


def test_a_file_that_is_not_there_or_not_ours_is_left_alone(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert Heartbeat.from_environment({"RU_HEARTBEAT": str(tmp_path / "absent")}) is None
        (tmp_path / "weights").write_bytes(b"somebody's weights" * 9)
        assert Heartbeat.from_environment({"RU_HEARTBEAT": str(tmp_path / "weights")}) is None
        assert Heartbeat.from_environment({"RU_HEARTBEAT": str(tmp_path)}) is None
    assert not (tmp_path / "absent").exists()
    assert (tmp_path / "weights").read_bytes() == b"somebody's weights" * 9
    assert "absent cannot be written" in caplog.text
    assert "weights is not a file of heartbeats" in caplog.text


def test_a_file_that_vanishes_or_shrinks_under_the_rank(path, beats):
    os.truncate(path, 0)
    beats.beat(1, Phase.TRAINING)
    path.unlink()
    beats.beat(2, Phase.TRAINING)
    assert read_beat(path) is None
    os.close(beats._descriptor)
    beats.beat(3, Phase.TRAINING)
    assert beats.step == 3
    beats._descriptor = -1


@pytest.mark.parametrize("content", [b"", b"RUBEAT01", b"RUBEAT02" + bytes(56), b"RUBEAT01" + b"\x7f" * 56])
def test_what_cannot_be_read_is_no_beat(tmp_path, content):
    (tmp_path / "odd").write_bytes(content)
    assert read_beat(tmp_path / "odd") is None


def test_a_failure_is_told_with_step_and_place(path, beats, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert read_failure(path) is None
    beats.beat(12, Phase.TRAINING)
    beats.failed(raised())
    report = json.loads((path.parent / "rank3.failure").read_text())
    assert report.pop("traceback").endswith("ZeroDivisionError: division by zero\n")
    assert report.pop("where").endswith(f"{os.path.basename(__file__)}:{raised.__code__.co_firstlineno + 2} in raised")
    assert report == {"rank": 3, "step": 12, "exception": "ZeroDivisionError", "message": "division by zero"}
    beats.failed(RuntimeError("what followed from it"))
    assert read_failure(path)["exception"] == "ZeroDivisionError"
    create_beat_file(path)
    assert read_failure(path) is None, "an older attempt's failure is not this one's"


def test_a_failure_that_is_hard_to_tell(path, beats, monkeypatch):
    class Unprintable(Exception):
        def __str__(self):
            raise ZeroDivisionError

    beats.failed(Unprintable())
    assert read_failure(path) is None
    monkeypatch.setenv("RANK", "first")
    # A file name that is no UTF-8, as Python holds it.
    beats.failed(RuntimeError("no file \udcff"))
    assert (read_failure(path)["rank"], read_failure(path)["message"]) == (0, "no file ?")


def test_a_failure_without_its_folder_is_nobodys_business(path, beats, tmp_path):
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    beats.failed(raised(), step=4, rank=1)
    assert not tmp_path.exists()


def test_stacks_come_while_the_rank_hangs(path):
    code = """
import os, threading
from megatron_ru.foundation.heartbeat import Heartbeat
beats = Heartbeat.from_environment(os.environ)
beats.register_stacks()
lock = threading.Lock()
lock.acquire()
def waits_for_its_peers():
    beats.beat(5)
    # In C, as a collective is: no Python handler would run here.
    lock.acquire()
waits_for_its_peers()
"""
    environment = {**os.environ, "RU_HEARTBEAT": str(path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            until = time.monotonic() + 20
            while read_beat(path).step != 5 and time.monotonic() < until:
                time.sleep(0.01)
            process.send_signal(heartbeat.STACKS_SIGNAL)
            stacks = heartbeat.stacks_path(path)
            while "waits_for_its_peers" not in stacks.read_text() and time.monotonic() < until:
                time.sleep(0.01)
            assert "in waits_for_its_peers" in stacks.read_text()
            assert process.poll() is None, "the rank lives on"
        finally:
            process.kill()
    assert int(heartbeat.STACKS_SIGNAL) == signal.SIGRTMIN + 7


def test_a_beat_costs_less_than_two_microseconds(beats):
    fastest = 1.0
    for _ in range(20):
        since = time.perf_counter()
        for step in range(2000):
            beats.beat(step, Phase.TRAINING)
        fastest = min(fastest, (time.perf_counter() - since) / 2000)
    assert fastest < 2e-6
