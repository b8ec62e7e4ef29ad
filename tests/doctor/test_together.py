"""Ranks on this machine as nodes: all well, a host that hangs, one with another version, one that never comes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import megatron_ru
from tests.doctor.started import Ranks, clean_environment, wait_until

HOST = socket.gethostname()


def report(folder):
    return {item["subject"]: item for item in json.loads((folder / "report.json").read_text())}


def children_of(pid):
    shown = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(word) for word in shown.stdout.split()]


def test_four_nodes_are_well(tmp_path):
    with Ranks(tmp_path, 4, "--timeout", "60") as ranks:
        ended = ranks.wait()
    assert {rank: code for rank, (code, _, _) in ended.items()} == dict.fromkeys(range(4), 0), ended
    found = report(tmp_path)
    names = [HOST, *(f"{HOST} (rank {rank})" for rank in (1, 2, 3))]
    assert found["nodes"]["detail"] == f"4 of 4 ranks on 4 nodes: {', '.join(names)}"
    assert found["versions"]["verdict"] == found["clocks"]["verdict"] == found["shared folder"]["verdict"] == "ok"
    # One machine has one clock, and the doctor measures it to better than a tenth of a second.
    assert found["clocks"]["values"]["skew_seconds"] < 0.1
    pairs = {subject: item for subject, item in found.items() if subject.startswith("pair ")}
    assert set(pairs) == {
        f"pair {names[first]} - {names[second]}" for first in range(4) for second in range(first + 1, 4)
    }
    assert all(item["values"]["bytes_per_second"] > 1e6 and item["values"]["ranks"] == 2 for item in pairs.values())
    assert found[f"{names[3]}: files"]["values"]["write_bytes_per_second"] > 0
    # The table is that of rank 0 alone, and nothing stays in the folder.
    assert [bool(out) for _, out, _ in ended.values()] == [True, False, False, False]
    assert ended[0][1].splitlines()[0].split()[:2] == ["nodes", "ok"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


@pytest.mark.slow
def test_a_stopped_host_is_named_and_stops_nobody(tmp_path):
    with Ranks(tmp_path, 3, "--timeout", "10") as ranks:
        stopped = ranks.processes[2]
        wait_until(lambda: children_of(stopped.pid))  # it came, and its worker is starting
        os.kill(stopped.pid, signal.SIGSTOP)
        begin = time.monotonic()
        ended = ranks.wait(0, 1, timeout=90)
        seconds = time.monotonic() - begin
    assert [ended[rank][0] for rank in (0, 1)] == [1, 1], ended
    # One step had to wait for it, with a margin of five seconds, and the last words for five more.
    assert seconds < 55
    found = report(tmp_path)
    assert found[f"{HOST} (rank 2)"]["verdict"] == "broken"
    assert found[f"{HOST} (rank 2)"]["detail"].startswith("stopped answering during ")
    assert found["nodes"]["detail"].startswith("2 of 3 ranks on 2 nodes: ")
    assert found[f"pair {HOST} - {HOST} (rank 1)"]["verdict"] == "ok"


def test_a_host_that_hangs_while_it_measures_is_named_with_what(tmp_path):
    """Its worker is stopped and it is not, as with a file system or a driver that hangs."""
    with Ranks(tmp_path, 2, "--timeout", "8") as ranks:
        wait_until(lambda: children_of(ranks.processes[1].pid))
        worker = children_of(ranks.processes[1].pid)[0]
        os.kill(worker, signal.SIGSTOP)
        ended = ranks.wait(timeout=90)
    assert [code for code, _, _ in ended.values()] == [1, 1], ended
    broken = {subject: item["detail"] for subject, item in report(tmp_path).items() if item["verdict"] == "broken"}
    assert len(broken) == 1
    (subject, detail) = broken.popitem()
    assert HOST in subject
    assert "(rank 1)" in subject
    assert "no answer within 8 s" in detail
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.slow
def test_rank_0_that_hangs_ends_the_others(tmp_path):
    with Ranks(tmp_path, 2, "--timeout", "1") as ranks:
        wait_until(lambda: children_of(ranks.processes[1].pid) or children_of(ranks.processes[0].pid))
        os.kill(ranks.processes[0].pid, signal.SIGSTOP)
        code, out, err = ranks.wait(1, timeout=110)[1]
    assert code in (1, 2)
    assert out == ""
    assert "rank 0 at 127.0.0.1:" in err
    assert "fell silent" in err or "found nobody" in err


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path):
    with Ranks(
        tmp_path, 3, "--timeout", "4", start=[0, 2], environ={0: {"SLURM_STEP_NODELIST": f"{HOST},gpu7"}}
    ) as ranks:
        ended = ranks.wait(timeout=90)
    assert [code for code, _, _ in ended.values()] == [1, 1], ended
    found = report(tmp_path)
    assert found["ranks 1"]["detail"].startswith("did not come within 4 s (nothing came from gpu7): ")
    assert found["nodes"]["detail"].startswith("2 of 3 ranks on 2 nodes: ")
    assert found[f"pair {HOST} - {HOST} (rank 2)"]["verdict"] == "ok"


def test_another_version_on_one_host_is_broken(tmp_path):
    package = tmp_path / "other" / "megatron_core-0.18.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.18.0\n")
    with Ranks(tmp_path, 2, "--timeout", "60", environ={1: {"PYTHONPATH": str(tmp_path / "other")}}) as ranks:
        ended = ranks.wait()
    assert [code for code, _, _ in ended.values()] == [1, 1], ended
    found = report(tmp_path)
    lines = [line for line in ended[0][1].splitlines() if line.startswith(f"{HOST} (rank 1): megatron-core")]
    assert [line.split()[4] for line in lines] == ["broken", "broken"]
    assert "megatron-core 0.18.0 is outside the supported" in lines[0]
    assert "0.18.0 there, " in lines[1]
    assert "versions" not in found


def test_folder_of_one_host_alone_is_broken(tmp_path):
    with Ranks(tmp_path, 1, "--timeout", "30", "--folder", str(tmp_path / "nowhere")) as ranks:
        code, _, err = ranks.wait()[0]
    assert code == 2
    assert f"{tmp_path / 'nowhere'} cannot be written to (No such file or directory): name another --folder" in err


def test_torchrun_starts_it_and_two_ranks_of_a_node_reduce_inside(tmp_path):
    words = ["--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-m", "megatron_ru", "doctor"]
    program = [sys.executable, "-m", "torch.distributed.run", *words, "--nodes", "auto", "--json", "report.json"]
    shown = subprocess.run(program, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    found = report(tmp_path)
    assert found["nodes"]["detail"] == f"2 of 2 ranks on 1 node: {HOST}"
    assert found[f"inside {HOST}"]["values"]["ranks"] == 2
    assert not [subject for subject in found if subject.startswith("pair ")]


def test_without_a_launcher_it_says_how_to_start(tmp_path):
    program = [sys.executable, "-m", "megatron_ru", "doctor", "--nodes", "auto"]
    shown = subprocess.run(program, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert shown.returncode == 2
    assert "megatron-ru launch slurm --nodes 2 -- megatron-ru doctor --nodes auto" in shown.stderr
    assert megatron_ru.__name__ not in shown.stdout
