"""Whole guards over real ranks: what each fault costs, and what is said about it."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.launch.guard.guarded import HOST, Guarded, guarded, wait_until

RETRY = ("--retries", "2")

# Jobs that need nothing while they run: they run side by side, most of their time asleep.
JOBS = {
    "well": {},
    "exit": {"faults": ["1:4:0:exit=7"]},
    "kill": {"faults": ["1:4:0:kill"]},
    "raise": {"faults": ["1:4:0:raise"]},
    "stop": {"faults": ["1:4:0:stop"], "world": 3},
    "hang": {"faults": ["1:4:0:hang"], "world": 3},
    "leave": {"faults": ["1:4:0:exit=0"], "world": 3},
    "late": {"how": "late", "options": ["--start-timeout", "3"]},
    "no first step": {"faults": ["1:1:0:hang"], "options": ["--start-timeout", "3"]},
    "deaf ranks": {"faults": ["0:1:0:deaf", "1:1:0:deaf", "1:4:0:hang"]},
    "deaf launcher": {"how": "deaf", "steps": 2},
    "deaf launcher and a failure": {"faults": ["1:2:0:exit=9"], "how": "deaf"},
    "hidden": {"faults": ["0:3:0:exit=5"], "how": "hides"},
    "keeper killed": {"faults": ["1:2:0:grandchild", "1:4:0:killkeeper"], "how": "deaf"},
    "grandchild and a failure": {"faults": ["0:2:0:grandchild", "1:4:0:exit=3"]},
    "grandchild": {"faults": ["0:2:0:grandchild"], "steps": 3},
    "three attempts": {
        "faults": ["1:4:0:kill", "0:3:1:hang"], "options": ["--retries", "3", "--job", "17"],
        "environ": {"MASTER_PORT": "29998", "MASTER_ADDR": "127.0.0.1"},
    },
    "same": {"faults": ["1:4:any:exit=7"], "options": RETRY},
    "bad input": {"faults": ["1:4:any:exit=2"], "options": RETRY},
    "killed again and again": {"faults": ["1:4:any:kill"], "options": RETRY},
    "elsewhere": {"faults": ["1:4:0:exit=7", "1:3:1:exit=7", "1:3:2:exit=8"], "options": RETRY},
    "own signal": {
        "faults": ["all:1:any:save=SIGUSR1"], "steps": 1000, "options": ["--signal-after", "USR1@3"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What became of each of JOBS."""
    folder = tmp_path_factory.mktemp("jobs")
    with ThreadPoolExecutor(6) as pool:
        running = {
            name: pool.submit(guarded, folder / name.replace(" ", "_"), *job.get("faults", ()),
                              **{key: value for key, value in job.items() if key != "faults"})
            for name, job in JOBS.items()
        }  # fmt: skip
        return {name: job.exception() or job.result() for name, job in running.items()}


@pytest.fixture
def job(jobs, request):
    found = jobs[request.param]
    if isinstance(found, BaseException):
        raise found
    return found


def of(*names):
    return pytest.mark.parametrize("job", names, indirect=True)


@of("well")
def test_a_job_that_goes_well_says_nothing(job):
    assert (job.code, job.said) == (0, "")
    (record,) = job.records
    assert (record["fault"], record["exit_code"], record["attempt"], record["again"]) == ("none", 0, 0, False)


@pytest.mark.parametrize(
    ("job", "code", "fault", "why"),
    [
        ("exit", 7, "exit", "exited with code 7"),
        ("kill", 137, "killed", "was killed by SIGKILL (code 137)"),
        # What a rank says of itself comes out as one printable line.
        ("raise", 1, "exit", "ended by ValueError: no such [31mbatch at train.py:12 in load (code 1)"),
    ],
    indirect=["job"],
)
def test_a_rank_that_fails_is_named_and_its_code_passed_through(job, code, fault, why):
    assert job.code == code
    (record,) = job.records
    named = {name: record[name] for name in ("fault", "rank", "host", "step", "exit_code")}
    assert named == {"fault": fault, "rank": 1, "host": HOST, "step": 3, "exit_code": code}
    assert record["why"] == why
    assert f"rank 1 on {HOST} after step 3: {why}\n" in job.said
    assert f"megatron-ru guard: exit code {code}\n" in job.said


@pytest.mark.parametrize(
    ("job", "fault", "why"),
    [
        ("stop", "stopped", r"is stopped \(state T\) without a beat for \d\.\d s"),
        ("hang", "stall", r"hangs without a beat for \d\.\d s \(limit 1\.5 s\), in .*:\d+ in read_the_next_batch"),
        ("leave", "early exit", "exited with code 0 while the others went on"),
    ],
    indirect=["job"],
)
def test_a_hang_ends_with_75_and_names_who_made_the_others_wait(job, fault, why):
    assert job.code == 75
    (record,) = job.records
    assert (record["fault"], record["rank"], record["step"]) == (fault, 1, 3)
    assert re.fullmatch(why, record["why"])
    assert "exit code 75, worth another start" in job.said
    # The start, 3 steps, the limit, the stacks of the others; on a machine that has other things to do.
    assert record["attempt_seconds"] < 2 * 1.5 + 6


@of("late")
def test_a_rank_that_never_came(job):
    assert job.code == 75
    assert (job.records[0]["fault"], job.records[0]["rank"]) == ("start", 1)
    assert job.records[0]["why"] == "did not come within 3.0 s"


@of("no first step")
def test_a_rank_that_makes_no_first_step(job):
    assert (job.code, job.records[0]["fault"], job.records[0]["rank"]) == (75, "start", 1)
    assert re.search(r"has made no step in \d\.\d s \(limit 3\.0 s\), in .* in read_the_next_batch", job.said)


@of("deaf ranks")
def test_ranks_that_are_deaf_to_term_are_killed_after_the_grace(job):
    assert (job.code, job.records[0]["rank"]) == (75, 1)
    assert job.seconds > job.records[0]["attempt_seconds"] + 0.9


@of("deaf launcher")
def test_a_launcher_that_hangs_and_is_deaf_to_term(job):
    assert (job.code, job.records[0]["fault"]) == (75, "launcher")
    assert "the launcher does not end, though all ranks have" in job.said


@of("deaf launcher and a failure")
def test_a_launcher_that_hangs_after_a_failure_costs_no_code(job):
    assert (job.code, job.records[0]["rank"]) == (9, 1)


@of("hidden")
def test_a_code_that_the_launcher_hides(job):
    assert (job.code, job.records[0]["fault"], job.records[0]["rank"]) == (5, "exit", 0)


@of("keeper killed")
def test_a_killed_keeper_takes_its_rank_and_all_below_along(job):
    assert (job.code, job.records[0]["fault"], job.records[0]["rank"]) == (75, "lost", 1)


@pytest.mark.parametrize(
    ("job", "code"), [("grandchild and a failure", 3), ("grandchild", 0)], indirect=["job"]
)  # fmt: skip
def test_grandchildren_in_a_session_of_their_own_are_ended(job, code):
    """That nobody is left, `Guarded.end` has seen."""
    assert job.code == code


@of("three attempts")
def test_another_attempt_finishes_the_job(job):
    assert job.code == 0
    assert [record["exit_code"] for record in job.records] == [137, 75, 0]
    assert [record["pause_seconds"] for record in job.records] == [0.1, 0.2, 0.0]
    assert "attempt 1 follows in 0.1 s\n" in job.said
    assert "attempt 2 went well" in job.said
    # A store of its own for each attempt: the next port, and behind 29999 comes 10000.
    assert sorted(set(job.out.splitlines())) == ["10000 17 2", "29998 17 0", "29999 17 1"]


@pytest.mark.parametrize(
    ("job", "codes", "why"),
    [
        ("same", [7, 7], "code 7 came twice after step 3, so another attempt would only come to the same place"),
        ("bad input", [2], "code 2 means bad input, and another attempt would not change it"),
        ("killed again and again", [137, 137, 137], "that was the last of 3 attempts"),
        ("elsewhere", [7, 7, 8], "that was the last of 3 attempts"),
    ],
    indirect=["job"],
)
def test_when_no_other_attempt_follows(job, codes, why):
    assert [record["exit_code"] for record in job.records] == codes
    assert job.code == codes[-1]
    assert why in job.said


@of("own signal")
def test_the_guard_gives_itself_the_signal_where_the_scheduler_does_not(job):
    assert (job.code, job.records[0]["fault"]) == (75, "saved")
    assert 3 < job.seconds < 20


def test_a_host_that_was_to_blame_twice_is_left_out(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("n0 slots=1\nn1.cluster slots=1\nn2 slots=1\n")
    job = guarded(
        tmp_path, "1:4:0:exit=7", "1:3:1:exit=7", options=("--retries", "3", "--spares", "1", "--hostfile", str(hosts)),
        environ={"TEST_HOSTFILE": str(hosts)},
    )  # fmt: skip
    assert (job.code, [record["host"] for record in job.records]) == (0, ["n1.cluster", "n1.cluster", ""])
    assert "n1 was to blame 2 times and is left out from now on" in job.said
    assert [record["left_out"] for record in job.records] == [[], ["n1"], []]
    assert hosts.read_text() == "n0 slots=1\nn2 slots=1\n"


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_saves_and_ends_without_another_attempt(tmp_path, name):
    """The launcher of the tests ends by either, and takes its ranks along: it is not asked."""
    job = Guarded(tmp_path, f"all:1:any:save={name}", steps=1000, options=("--retries", "5"))
    job.wait_for_step(3)
    job.process.send_signal(getattr(signal, name))
    job.end()
    assert job.code == 75
    assert [record["fault"] for record in job.records] == ["saved"]
    assert f"{name} asked for an end, so there is no other attempt here" in job.said


def test_ranks_that_expect_no_term_end_by_it(tmp_path):
    job = Guarded(tmp_path, steps=1000, options=("--retries", "3"))
    job.wait_for_step(3)
    job.process.send_signal(signal.SIGTERM)
    job.end()
    assert (job.code, len(job.records)) == (143, 1)


def test_a_second_term_is_an_order(tmp_path):
    job = Guarded(tmp_path, "all:1:any:deaf", steps=1000, options=("--grace", "60", "--stall", "60"))
    job.wait_for_step(3)
    job.process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    job.process.send_signal(signal.SIGTERM)
    job.end(timeout=15)
    assert job.code == 143


def test_when_the_guard_is_killed_nobody_is_left(tmp_path):
    job = Guarded(tmp_path, "all:1:any:deaf", steps=1000)
    job.wait_for_step(3)
    job.process.kill()
    said = job.process.communicate(timeout=20)[1]
    wait_until(lambda: not job.left())
    assert "megatron-ru keep: the guard of rank" in said


def test_a_machine_that_slept_blames_nobody(tmp_path):
    """Longer than the limit: for all of the job no time has passed in which they could have said something."""
    job = Guarded(tmp_path, steps=60, options=("--stall", "4"))
    job.wait_for_step(3)
    everybody = [job.process.pid, *job.left()]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in everybody:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(5 if number == signal.SIGSTOP else 0)
    assert job.end().code == 0


def guard(*words):
    program = [sys.executable, "-m", "megatron_ru", "guard", *words]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True)


def test_a_launcher_without_keepers_keeps_its_code(tmp_path):
    ended, missing = guard("--", "bash", "-c", "exit 11"), guard("--", str(tmp_path / "no launcher"))
    assert "the launcher ended with code 11" in ended.communicate(timeout=10)[1]
    assert "No such file" in missing.communicate(timeout=10)[1]
    assert (ended.returncode, missing.returncode) == (11, 127)


def test_a_launcher_without_keepers_gets_the_signals(tmp_path):
    told = guard("--", "bash", "-c", f"trap 'exit 9' USR1; touch {tmp_path}/up; while :; do sleep 0.05; done")
    wait_until((tmp_path / "up").exists)
    told.send_signal(signal.SIGUSR1)
    told.communicate(timeout=15)
    assert told.returncode == 9
