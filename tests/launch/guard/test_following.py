"""Guards of several nodes, all on this host, each with a launcher of its own, as torchrun by hand has them."""

import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launch.fake_cluster import two_free_ports
from tests.launch.guard.guarded import LAUNCHER, TRAINER, alive, command, numbers, read, wait_until

# A launcher of one rank for each node.
NODE = LAUNCHER.replace('"RANK": str(rank)', '"RANK": os.environ["NODE"]').replace(
    '"WORLD_SIZE": str(world)', '"WORLD_SIZE": os.environ["NODES"]'
)


class Nodes:
    """Guards of `count` nodes."""

    def __init__(self, folder, count, *faults, steps=6, options=()):
        self.folder, self.count, self.port, self.mark = folder, count, two_free_ports(), uuid.uuid4().hex
        (folder / "trainer.py").write_text(TRAINER)
        (folder / "launcher.py").write_text(NODE)
        (folder / "exchange").mkdir()
        self.faults, self.steps, self.options = faults, steps, options
        self.guards = {}

    def start(self, *nodes):
        for node in nodes:
            words = [
                sys.executable, "-m", "megatron_ru", "guard", "--stall", "1.5", "--grace", "0.5", "--back-off", "0.1",
                "--nodes", str(self.count), "--node", str(node), "--address", "127.0.0.1", "--port", str(self.port),
                *self.options, "--", sys.executable, str(self.folder / "launcher.py"), "1", "plain", sys.executable,
                str(self.folder / "trainer.py"), str(self.steps), str(self.folder / "exchange"), *self.faults,
            ]  # fmt: skip
            environ = {**os.environ, "NODE": str(node), "NODES": str(self.count), "TEST_MARK": self.mark,
                       "MASTER_PORT": str(self.port - 1)}  # fmt: skip
            self.guards[node] = subprocess.Popen(words, env=environ, stdout=-1, stderr=-1, text=True)
        return self

    def codes(self):
        """The exit codes by node, once all have ended and nobody is left."""
        said = {node: guard.communicate(timeout=25) for node, guard in self.guards.items()}
        self.out = {node: out for node, (out, _) in said.items()}
        self.said = {node: error for node, (_, error) in said.items()}
        wait_until(lambda: not self.left(), "left behind")
        return [self.guards[node].returncode for node in sorted(self.guards)]

    def left(self):
        return [pid for pid in numbers() if alive(pid) and self.mark.encode() in read(pid, "environ") + command(pid)]


# Whole runs that need nothing while they go on, side by side.
RUNS = {
    "exit": {"faults": ["1:3:0:exit=7"]},
    "stop": {"faults": ["1:3:0:stop"]},
    "leave": {"faults": ["1:3:0:exit=0"]},
    "again": {"faults": ["1:3:0:kill"], "options": ["--retries", "1", "--job", "9"]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Exit codes of each of RUNS, and the guards that gave them."""

    def run(folder, faults, **more):
        nodes = Nodes(folder, 2, *faults, **more).start(0, 1)
        return nodes.codes(), nodes

    # pytest makes its folders in one thread.
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    with ThreadPoolExecutor(4) as pool:
        running = {name: pool.submit(run, folders[name], **more) for name, more in RUNS.items()}
        return {name: one.result() for name, one in running.items()}


@pytest.mark.parametrize(
    ("name", "code", "why"), [("exit", 7, "exited with code 7"), ("stop", 75, "is stopped"), ("leave", 75, "went on")]
)
def test_the_verdict_of_the_first_guard_is_that_of_all(runs, name, code, why):
    codes, nodes = runs[name]
    assert codes == [code, code]
    assert "rank 1 on" in nodes.said[0]
    assert why in nodes.said[0]


def test_another_attempt_begins_on_all_nodes_with_a_store_of_its_own(runs):
    codes, nodes = runs["again"]
    assert codes == [0, 0]
    lines = {tuple(line.split()) for out in nodes.out.values() for line in out.splitlines()}
    # The port behind the store's is the guard's.
    assert sorted(lines) == [(str(nodes.port - 1), "9", "0"), (str(nodes.port + 1), "9", "1")]


def test_all_nodes_end_well_whichever_comes_first(tmp_path):
    nodes = Nodes(tmp_path, 3).start(2, 0)
    wait_until((tmp_path / "exchange" / "0" / "1.0").exists)
    assert nodes.start(1).codes() == [0, 0, 0]
    assert nodes.said == {0: "", 1: "", 2: ""}


@pytest.mark.parametrize("gone", [0, 1])
def test_when_one_guard_is_killed_all_end(tmp_path, gone):
    nodes = Nodes(tmp_path, 2, steps=1000).start(0, 1)
    wait_until((tmp_path / "exchange" / "0" / "3.1").exists)
    nodes.guards[gone].kill()
    codes = nodes.codes()
    assert codes[gone] == -9
    assert codes[1 - gone] in ((75,) if gone == 0 else (75, 143))


def test_a_node_that_nobody_expects(tmp_path):
    nodes = Nodes(tmp_path, 2, steps=30)
    nodes.start(0, 1)
    nodes.count = 3
    nodes.start(2)
    assert nodes.codes() == [0, 0, 2]
    assert "node 2 is not between 1 and 1" in nodes.said[2]
