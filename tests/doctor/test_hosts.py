"""Hosts of their own names, interfaces and links, made of network namespaces: one slowed down, one cut off."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.doctor.started import clean_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "nsenter", "unshare"))),
        reason="making hosts needs root and iproute2",
    ),
]


class Hosts:
    """Four hosts d0 to d3 on one bridge; `hub` is where the far ends of their links are."""

    def __init__(self, folder):
        self.folder = folder
        self.tag = f"ru{os.getpid()}"
        self.hub = f"{self.tag}hub"
        self.names = [f"d{number}" for number in range(4)]
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.remove()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")

    def _make(self):
        self.ip("netns", "add", self.hub)
        self.ip("-n", self.hub, "link", "add", "bridge0", "type", "bridge")
        self.ip("-n", self.hub, "link", "set", "bridge0", "up")
        lines = ["127.0.0.1 localhost"]
        for number, name in enumerate(self.names):
            space = f"{self.tag}{name}"
            lines.append(f"10.93.0.{10 + number} {name}")
            self.ip("netns", "add", space)
            self.ip("-n", space, "link", "set", "lo", "up")
            self.ip("-n", space, "link", "add", "bond0", "type", "veth", "peer", "name", name, "netns", self.hub)
            self.ip("-n", self.hub, "link", "set", name, "master", "bridge0", "up")
            self.ip("-n", space, "addr", "add", f"10.93.0.{10 + number}/24", "dev", "bond0")
            self.ip("-n", space, "link", "set", "bond0", "up")
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def start(self, *words):
        """A rank of the doctor on each host."""
        script = f'mount --bind {self.folder}/hosts /etc/hosts && hostname "$0" && exec "$@"'
        started = []
        for number, name in enumerate(self.names):
            environ = clean_environment(
                RANK=str(number), WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="10.93.0.10",
                MASTER_PORT="12399", TORCH_CPP_LOG_LEVEL="ERROR",
            )  # fmt: skip
            del environ["GLOO_SOCKET_IFNAME"]
            program = [
                sys.executable,
                "-m",
                "megatron_ru",
                "doctor",
                "--nodes",
                "auto",
                "--json",
                "report.json",
                *words,
            ]
            enter = ["nsenter", f"--net=/run/netns/{self.tag}{name}", "unshare", "-m", "-u", "sh", "-c", script, name]
            started.append(subprocess.Popen([*enter, *program], cwd=self.folder, env=environ, stdout=subprocess.PIPE))
        return started

    def remove(self):
        for space in (self.hub, *(f"{self.tag}{name}" for name in self.names)):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def report(self):
        return {item["subject"]: item for item in json.loads((self.folder / "report.json").read_text())}


@pytest.fixture
def hosts(tmp_path):
    made = Hosts(tmp_path)
    yield made
    made.remove()


def ended(started, seconds):
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_slow_link_is_told_for_each_pair_and_for_the_host(hosts):
    limit = ["root", "tbf", "rate", "200mbit", "burst", "256kb", "latency", "50ms"]
    for space, device in ((f"{hosts.tag}d2", "bond0"), (hosts.hub, "d2")):
        subprocess.run(["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device, *limit], check=True)
    assert ended(hosts.start("--timeout", "60"), 150) == [0, 0, 0, 0]
    found = hosts.report()
    pairs = {subject: item for subject, item in found.items() if subject.startswith("pair ")}
    assert len(pairs) == 6
    assert [pairs[f"pair {two}"]["verdict"] for two in ("d0 - d2", "d1 - d2", "d2 - d3")] == ["slow"] * 3
    # The others share the cores of this machine with whatever else runs.
    assert pairs["pair d0 - d3"]["values"]["bytes_per_second"] > 50e6
    # 200 Mbit/s are 25 MB/s.
    assert 15e6 < found["pair d1 - d2"]["values"]["bytes_per_second"] < 26e6
    assert found["d2"]["detail"].startswith("all 3 pairs with it are slow and others are not: it is this host")


def test_a_host_that_is_cut_off_is_named_and_the_others_go_on(hosts):
    started = hosts.start("--timeout", "10")
    end = time.monotonic() + 60
    # Its file shows that d3 has arrived and measures.
    while not list(hosts.folder.glob(".megatron-ru-doctor-*")):
        assert time.monotonic() < end
        time.sleep(0.02)
    hosts.ip("-n", hosts.hub, "link", "set", "d3", "down")
    begin = time.monotonic()
    assert ended(started, 120) == [1, 1, 1, 1]
    assert time.monotonic() - begin < 60
    found = hosts.report()
    assert found["d3"]["verdict"] == "broken"
    assert found["d3"]["detail"].startswith("stopped answering during ")
    assert found["nodes"]["detail"].startswith("3 of 4 ranks on 3 nodes: d0, d1, d2; ")
    pairs = {subject: item["verdict"] for subject, item in found.items() if subject.startswith("pair ")}
    assert set(pairs) == {"pair d0 - d1", "pair d0 - d2", "pair d1 - d2"}
    assert "broken" not in pairs.values()
