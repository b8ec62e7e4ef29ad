"""A keeper before a guard that the test plays itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest

from tests.launch.guard.guarded import HOST, TRAINER, alive, command, numbers, read, wait_until


class FakeGuard:
    """Listens, and says what the test tells it to."""

    def __init__(self, folder):
        self.folder = folder
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.settimeout(15)
        self.mark = uuid.uuid4().hex
        (folder / "trainer.py").write_text(TRAINER)
        (folder / "exchange").mkdir()
        self.line = None

    def start(self, *words, **environ):
        port = self.listening.getsockname()[1]
        environ = {
            **os.environ, "RU_GUARD": f"127.0.0.1:{port}:secret", "RU_GUARD_JOB": "17", "RU_ATTEMPT": "0", "RANK": "0",
            "WORLD_SIZE": "1", "TEST_MARK": self.mark, **environ,
        }  # fmt: skip
        program = [sys.executable, "-m", "megatron_ru", "keep", "--", *words]
        self.keeper = subprocess.Popen(program, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return self.keeper

    def train(self, steps, *faults):
        return self.start(
            sys.executable, str(self.folder / "trainer.py"), str(steps), str(self.folder / "exchange"), *faults
        )

    def accept(self, stall=600.0, grace=0.5):
        """The greeting of the keeper, which is answered."""
        connection, _ = self.listening.accept()
        connection.settimeout(15)
        self.line = connection.makefile("rwb", buffering=0)
        connection.close()
        greeting = self.hear("hello")
        self.say("welcome", stall=stall, grace=grace, pause=0.1)
        return greeting

    def hear(self, kind):
        """The next message of that kind; every one before it is answered."""
        while True:
            said = json.loads(self.line.readline())
            if said["kind"] == kind:
                return said
            self.say("pong")

    def say(self, kind, **fields):
        self.line.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def cut(self):
        self.line.close()

    def left(self):
        return [pid for pid in numbers() if alive(pid) and self.mark.encode() in read(pid, "environ") + command(pid)]


@pytest.fixture
def guard(tmp_path):
    fake = FakeGuard(tmp_path)
    yield fake
    fake.keeper.kill()
    fake.keeper.communicate()
    fake.listening.close()


def test_what_a_keeper_says(guard):
    guard.train(3)
    greeting = guard.accept()
    assert {name: greeting[name] for name in ("token", "job", "attempt", "rank", "world", "host", "pid")} == {
        "token": "secret", "job": "17", "attempt": 0, "rank": 0, "world": 1, "host": HOST, "pid": guard.keeper.pid,
    }  # fmt: skip
    steps, said = set(), {}
    while said.get("kind") != "exit":
        said = json.loads(guard.line.readline())
        if said["kind"] == "ping" and said["beats"]:
            steps.add(said["step"])
            assert said["letter"] in "RSD"
            assert said["idle"] < 2
        guard.say("noted" if said["kind"] == "exit" else "pong")
    assert (said["code"], said["step"]) == (0, 3)
    assert steps & {1, 2, 3}
    assert guard.keeper.wait(10) == 0


@pytest.mark.parametrize(("what", "code"), [("exit=7", 7), ("kill", 137), ("raise", 1)])
def test_how_a_rank_ended(guard, what, code):
    guard.train(3, f"0:2:0:{what}")
    guard.accept()
    said = guard.hear("exit")
    guard.say("noted")
    assert (said["code"], said["step"]) == (code, 1)
    if what == "raise":
        assert (said["exception"], said["where"]) == ("ValueError", "train.py:12 in load")
        assert said["message"] == "no such [31mbatch"
    assert guard.keeper.wait(10) == code


def test_a_keeper_knows_its_rank_by_its_launcher(guard):
    guard.start("true", RANK="", WORLD_SIZE="", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="8")
    greeting = guard.accept()
    assert (greeting["rank"], greeting["world"]) == (3, 8)
    guard.hear("exit")
    guard.say("noted")


def test_stop_ends_the_rank_and_the_stacks_come_when_they_are_asked_for(guard):
    guard.train(100, "0:2:0:hang")
    guard.accept()
    # A moment after its last beat the rank is where it hangs.
    while (said := guard.hear("ping"))["step"] < 1 or said["idle"] < 0.5:
        guard.say("pong")
    guard.say("stacks")
    assert guard.hear("stacks")["frames"][0].endswith("in read_the_next_batch")
    guard.say("stop")
    assert guard.hear("exit")["code"] == 143
    guard.say("noted")
    assert guard.keeper.wait(10) == 143
    wait_until(lambda: not guard.left())


def test_a_rank_that_expects_no_signal_for_its_stacks_lives_on(guard):
    guard.start("sleep", "100")
    guard.accept()
    guard.say("stacks")
    assert guard.hear("stacks")["frames"] == []
    assert guard.hear("ping")["letter"] in "RSD"
    guard.say("stop")
    assert guard.hear("exit")["code"] == 143


def test_a_cut_line_is_taken_up_again_and_training_goes_on(guard):
    guard.train(100)
    first = guard.accept()
    before = guard.hear("ping")["step"]
    guard.cut()
    again = guard.accept()
    assert (again["rank"], again["pid"]) == (first["rank"], first["pid"])
    assert guard.hear("ping")["step"] >= before
    guard.say("stop")
    guard.hear("exit")


def test_an_end_that_was_told_into_a_cut_line_is_told_again(guard):
    guard.start("bash", "-c", "sleep 1; exit 9")
    guard.accept()
    guard.cut()
    guard.listening.settimeout(0.01)
    time.sleep(1.2)
    guard.listening.settimeout(10)
    guard.accept()
    assert guard.hear("exit")["code"] == 9
    guard.say("noted")
    assert guard.keeper.wait(10) == 9


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_without_its_guard_the_rank_is_ended_and_worth_another_start(guard, how):
    guard.train(1000, "0:1:0:deaf")
    guard.accept(stall=1.0)
    guard.hear("ping")
    if how == "gone":
        guard.cut()
        guard.listening.close()
    begun = time.monotonic()
    assert guard.keeper.wait(15) == 75
    assert time.monotonic() - begun < 6
    assert f"the guard of rank 0 on {HOST} is gone: ending the rank" in guard.keeper.stderr.read()
    wait_until(lambda: not guard.left())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_signals_are_passed_on_once(guard, name):
    """To the process that beats, and not to the shell before it, which would die of USR1."""
    program = f"{sys.executable} {guard.folder}/trainer.py 1000 {guard.folder}/exchange all:1:any:save={name}; exit $?"
    guard.start("bash", "-c", program)
    guard.accept()
    while guard.hear("ping")["step"] < 1:
        guard.say("pong")
    for _ in range(3):
        guard.keeper.send_signal(getattr(signal, name))
    assert guard.hear("signalled")["number"] == getattr(signal, name)
    assert guard.hear("exit")["code"] == 75


def test_a_signal_of_the_guard_reaches_the_rank(guard):
    guard.start("bash", "-c", "trap 'exit 5' USR1; while :; do sleep 0.05; done")
    guard.accept()
    time.sleep(0.3)
    guard.say("signal", number=int(signal.SIGUSR1))
    assert guard.hear("exit")["code"] == 5
    # No signal that a keeper does not know.
    assert guard.keeper.poll() is None
    guard.say("noted")
    assert guard.keeper.wait(10) == 5


def test_words_of_the_guard_that_mean_nothing_do_nothing(guard):
    guard.start("sleep", "100")
    guard.accept()
    guard.line.write(b'{"kind":"signal","number":"x"}\n{"kind":"signal","number":9}\n{"kind":"??"}\n')
    guard.line.write(b'{"kind":"welcome","stall":"x","grace":-3,"pause":1e99}\n')
    time.sleep(0.3)
    guard.say("welcome", stall=600, grace=0.2, pause=0.1)
    assert guard.hear("ping")["letter"] in "RSD"
    guard.line.write(b"no message\n")
    # It hangs up, and calls again.
    guard.accept()
    guard.say("stop")
    assert guard.hear("exit")["code"] == 143


def test_a_killed_keeper_leaves_nobody(guard):
    guard.train(1000, "0:1:0:grandchild")
    guard.accept(grace=0.3)
    # The keeper looks around every five pings: the one without our mark is known to the reaper by then.
    while guard.hear("ping")["step"] < 20:
        guard.say("pong")
    guard.keeper.kill()
    wait_until(lambda: not guard.left())
    wait_until(lambda: not any("ru-reaper" in read(pid, "comm").decode() for pid in guard.left()))


def test_without_a_guard_the_command_takes_the_keepers_place(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "RU_GUARD"}
    program = [sys.executable, "-m", "megatron_ru", "keep", "--"]
    keeper = subprocess.Popen(
        [*program, "bash", "-c", "echo $$; exit 4"], env=environ, stdout=subprocess.PIPE, text=True
    )
    assert keeper.communicate(timeout=10)[0] == f"{keeper.pid}\n"
    assert keeper.returncode == 4
    missing = subprocess.run([*program, str(tmp_path / "none")], env=environ, capture_output=True, text=True)
    assert (missing.returncode, "No such file" in missing.stderr) == (127, True)


def test_a_command_that_is_not_there(guard):
    guard.start(str(guard.folder / "none"))
    guard.accept()
    assert guard.hear("exit")["code"] == 127
    guard.say("noted")
    assert guard.keeper.wait(10) == 127


def test_a_guard_that_never_answers_is_complained_about_and_the_rank_runs():
    """Half of a second here; the complaint comes after 15 s."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    environ = {**os.environ, "RU_GUARD": f"127.0.0.1:{port}:x", "RANK": "0"}
    program = [sys.executable, "-m", "megatron_ru", "keep", "--", "bash", "-c", "sleep 0.5; exit 3"]
    assert subprocess.run(program, env=environ, timeout=10).returncode == 3


def test_a_guard_that_is_no_address_is_one_sentence():
    program = [sys.executable, "-m", "megatron_ru", "keep", "--", "true"]
    shown = subprocess.run(program, env={**os.environ, "RU_GUARD": "nonsense"}, capture_output=True, text=True)
    assert shown.returncode == 2
    assert shown.stderr == (
        "megatron-ru: error: RU_GUARD='nonsense' is no address:port:token: unset it, or use megatron-ru guard\n"
    )


def test_orphans_of_an_earlier_attempt_are_ended_and_others_are_not(guard):
    def sleeper(mark):
        return subprocess.Popen(["sleep", "100"], env={**os.environ, "RU_KEEPER": mark}, start_new_session=True)

    own = read(os.getpid(), "stat").rpartition(b")")[2].split()[19].decode()
    orphan, kept, strange = sleeper("16:2:999999999:1"), sleeper(f"16:0:{os.getpid()}:{own}"), sleeper("hello")
    try:
        reused = sleeper(f"16:1:{os.getpid()}:1")
        guard.start("true")
        guard.accept()
        assert guard.hear("exit")["code"] == 0
        guard.say("noted")
        assert guard.keeper.wait(10) == 0
        said = guard.keeper.stderr.read()
        assert f"ended process {orphan.pid} on {HOST}, left over from attempt 2 of job 16" in said
        # The number of its keeper is somebody else's by now.
        assert f"ended process {reused.pid} on {HOST}, left over from attempt 1 of job 16" in said
        assert (orphan.wait(5), reused.wait(5)) == (-9, -9)
        assert (kept.poll(), strange.poll()) == (None, None)
    finally:
        for process in (orphan, kept, strange, reused):
            process.kill()
            process.wait()
