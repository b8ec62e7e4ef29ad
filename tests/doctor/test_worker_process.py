"""The process that measures: answers, errors, hanging, dying."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_ru.doctor import worker
from megatron_ru.doctor.worker_process import Worker


@pytest.fixture
def process():
    made = Worker()
    yield made
    made.kill()


def test_measures_a_folder_twice_in_one_process(process, tmp_path):
    (tmp_path / "shown").touch()
    first = process.ask({"do": "files", "folder": str(tmp_path), "show": "shown"}, 60)
    pid = process._process.pid
    second = process.ask({"do": "files", "folder": str(tmp_path), "show": "hidden"}, 60)
    assert (first["seen"], second["seen"]) == (True, False)
    assert first["times"]["write_bytes_per_second"] > 0
    assert process._process.pid == pid


def test_an_error_is_an_answer(process, tmp_path):
    answer = process.ask({"do": "files", "folder": str(tmp_path / "nowhere"), "show": "x"}, 60)
    assert answer["error"].startswith("FileNotFoundError: [Errno 2] No such file or directory: ")


def test_one_that_hangs_is_killed_and_the_next_is_new(process, tmp_path):
    assert "times" in process.ask({"do": "files", "folder": str(tmp_path), "show": "x"}, 60)
    pid = process._process.pid
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert process.ask({"do": "files", "folder": str(tmp_path), "show": "x"}, 1) == {"error": "no answer within 1 s"}
    assert time.monotonic() - begin < 4
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert "times" in process.ask({"do": "files", "folder": str(tmp_path), "show": "x"}, 60)


def test_one_that_dies_says_how(process, tmp_path):
    process.send({"do": "files", "folder": str(tmp_path), "show": "x"})
    process._process.send_signal(signal.SIGKILL)
    assert process.answer(60)["error"].startswith("the measuring process ended with signal SIGKILL")
    process.send({"do": "nothing of ours"})
    assert process.answer(60)["error"] == ("the measuring process ended with exit code 1: KeyError: 'nothing of ours'")


def test_it_ends_with_its_parent(tmp_path):
    """Killed by the kernel, though it would measure for minutes."""
    program = (
        "import os, sys, time\n"
        "from megatron_ru.doctor.worker_process import Worker\n"
        "worker = Worker()\n"
        "assert 'times' in worker.ask({'do': 'files', 'folder': sys.argv[1], 'show': 'x'}, 60)\n"
        "print(worker._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_errors_become_one_line():
    assert worker._one_line(ValueError("\n first\nsecond")) == "ValueError: first"
    assert worker._one_line(RuntimeError()) == "RuntimeError"
