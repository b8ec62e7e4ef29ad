"""A guard over real processes: a launcher of a few lines, and ranks that beat, wait for each other and misbehave."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid

# What a rank does: beats once for each step, then waits for the others as in a collective. It maps the file itself, so
# that guard and trainer agree by the layout of its bytes and nothing else. Words: STEPS, FOLDER, [FAULT ...], each
# fault RANK:STEP:ATTEMPT:WHAT.
TRAINER = """
import faulthandler, json, mmap, os, signal, struct, subprocess, sys, time

rank, world, attempt = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RU_ATTEMPT"])
steps, folder = int(sys.argv[1]), f"{sys.argv[2]}/{attempt}"
path = os.environ["RU_HEARTBEAT"]
stream = open(path, "r+b")
memory = mmap.mmap(stream.fileno(), 64)
assert memory[:8] == b"RUBEAT01" and memory[8:32] == struct.pack("<qqq", 0, -1, 0), memory[:]
stacks = open(path + ".stacks", "a")
faulthandler.register(signal.SIGRTMIN + 7, file=stacks, all_threads=True)
os.makedirs(folder, exist_ok=True)
beats = 0


def beat(step, phase):
    global beats
    beats += 1
    memory[8:32] = struct.pack("<qqq", beats, step, phase)


def all_reduce(step):
    open(f"{folder}/{step}.{rank}", "w").close()
    while not all(os.path.exists(f"{folder}/{step}.{other}") for other in range(world)):
        if saves:
            # The others got the signal too, and may have left before this step.
            sys.exit(75)
        time.sleep(0.01)


def read_the_next_batch():
    time.sleep(600)


def misbehave(what):
    kind, _, value = what.partition("=")
    if kind == "exit":
        os._exit(int(value))
    elif kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    elif kind == "hang":
        read_the_next_batch()
    elif kind == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif kind == "killkeeper":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    elif kind == "raise":
        with open(path + ".failure", "w") as report:
            json.dump({"rank": rank, "step": step, "exception": "ValueError", "message": "no\\tsuch \\x1b[31mbatch",
                       "where": "train.py:12 in load", "traceback": "..."}, report)
        sys.exit(1)
    elif kind == "grandchild":
        # In a session of its own, without our environment, and deaf to TERM.
        subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)",
             os.environ["TEST_MARK"]], start_new_session=True, env={})
        time.sleep(0.3)
    elif kind == "save":
        signal.signal(getattr(signal, value), lambda number, frame: saves.append(number))


saves = []
faults = [fault.split(":") for fault in sys.argv[3:]]
beat(-1, 0)
print(os.environ.get("MASTER_PORT"), os.environ["RU_GUARD_JOB"], attempt, flush=True)
for step in range(1, steps + 1):
    for of, when, during, what in faults:
        if of in ("all", str(rank)) and when == str(step) and during in ("any", str(attempt)):
            misbehave(what)
    all_reduce(step)
    beat(step, 1)
    if saves:
        sys.exit(75)
    time.sleep(0.05)
beat(steps, 4)
"""

# Starts a keeper for each rank and waits, as a launcher does; ends the others when one fails. Words: WORLD, HOW.
LAUNCHER = """
import os, signal, subprocess, sys, time
world, how, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
hosts = os.environ.get("TEST_HOSTFILE")
ranks = []
for rank in range(world):
    environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    if hosts:
        environ["SLURMD_NODENAME"] = [line.split()[0] for line in open(hosts)][rank]
    if how == "late" and rank == world - 1:
        break
    ranks.append(subprocess.Popen([sys.executable, "-m", "megatron_ru", "keep", "--", *words], env=environ))
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while any(rank.poll() is None for rank in ranks):
    if how != "deaf" and any(rank.poll() for rank in ranks):
        break
    time.sleep(0.02)
code = next((abs(rank.returncode) for rank in ranks if rank.returncode), 0)
if how == "deaf" or (how == "lingers" and code == 0):
    while True:
        time.sleep(1)
for rank in ranks:
    if rank.poll() is None:
        rank.terminate()
for rank in ranks:
    rank.wait()
sys.exit(0 if how == "hides" else code)
"""


class Guarded:
    """One guard, started."""

    def __init__(self, folder, *faults, world=2, steps=8, how="plain", options=(), environ=(), trainer=TRAINER):
        self.mark = uuid.uuid4().hex
        self.folder, self.report = folder, folder / "report.jsonl"
        (folder / "trainer.py").write_text(trainer)
        (folder / "launcher.py").write_text(LAUNCHER)
        exchange = folder / "exchange"
        exchange.mkdir(exist_ok=True)
        words = [
            sys.executable, "-m", "megatron_ru", "guard", "--stall", "1.5", "--grace", "1", "--back-off", "0.1",
            "--report", str(self.report), *options, "--", sys.executable, str(folder / "launcher.py"), str(world), how,
            sys.executable, str(folder / "trainer.py"), str(steps), str(exchange), *faults,
        ]  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RU_")}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**inherited, "TEST_MARK": self.mark, **dict(environ)},
        )  # fmt: skip

    def wait_for_step(self, step, rank=0, attempt=0):
        """Returns once that rank has come to that step."""
        wait_until((self.folder / "exchange" / str(attempt) / f"{step}.{rank}").exists)

    def end(self, timeout=30):
        """Waits for the end; sets code, out, said, seconds and records, and sees that nobody is left."""
        try:
            self.out, self.said = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.out, self.said = self.process.communicate()
            raise AssertionError(f"the guard did not end in {timeout} s: {self.said}") from None
        finally:
            self.seconds = time.monotonic() - self.started
        self.code = self.process.returncode
        self.records = [json.loads(line) for line in self.report.read_text().splitlines()]
        wait_until(lambda: not self.left(), f"left behind: {[command(pid) for pid in self.left()]}", seconds=5)
        return self

    def left(self):
        """The numbers of the processes that this guard's job has left behind."""
        return [pid for pid in numbers() if alive(pid) and self.mark.encode() in (read(pid, "environ") + command(pid))]


def guarded(folder, *faults, **more):
    """The same, at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    return Guarded(folder, *faults, **more).end()


def wait_until(condition, sentence="in vain", seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, sentence
        time.sleep(0.02)


def numbers():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def read(pid, name):
    try:
        with open(f"/proc/{pid}/{name}", "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def command(pid):
    return read(pid, "cmdline")


def alive(pid):
    return read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"], [b"X"])


HOST = socket.gethostname()
