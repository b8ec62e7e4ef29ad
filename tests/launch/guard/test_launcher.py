import json
import socket
import subprocess
import sys
import time

import pytest

from megatron_ru.launch.guard.clock import WatchClock
from megatron_ru.launch.guard.launcher import port_of_attempt
from tests.launch.fake_cluster import two_free_ports


def test_the_port_of_an_attempt_moves_by_one_and_past_who_listens():
    port = two_free_ports()
    assert port_of_attempt(str(port), 0, "127.0.0.1") == str(port)
    assert port_of_attempt(str(port), 1, "127.0.0.1") == str(port + 1)
    assert int(port_of_attempt(str(port), 1, "127.0.0.1", [port + 1])) > port + 1
    with socket.create_server(("127.0.0.1", port + 1)):
        assert int(port_of_attempt(str(port), 1, "127.0.0.1")) > port + 1


def test_ports_stay_below_the_ephemeral_ones():
    assert 10000 <= int(port_of_attempt("29999", 1, "127.0.0.1")) < 10100
    # One that the user has put outside stays there.
    assert int(port_of_attempt("40000", 2, "127.0.0.1")) > 40001
    assert port_of_attempt(None, 3, "127.0.0.1") is None
    assert port_of_attempt("any", 3, "127.0.0.1") == "any"


# In a process of its own: whoever has a launcher ends all that is below it.
END = """
import time
from megatron_ru.launch.guard.launcher import Launcher

deaf = "trap '' TERM; (setsid sleep 100 &) ; while :; do sleep 0.1; done"
launcher = Launcher(["bash", "-c", deaf], {"PATH": "/bin"})
time.sleep(0.3)
assert launcher.poll() is None
begun = time.monotonic()
while not launcher.end(0.5, time.monotonic()):
    time.sleep(0.02)
print(launcher.code, 0.4 < time.monotonic() - begun < 5)
"""
CODE = """
import json, sys, time
from megatron_ru.launch.guard.launcher import Launcher

launcher = Launcher(json.loads(sys.argv[1]), {"PATH": "/bin"})
while launcher.poll() is None:
    time.sleep(0.01)
print(launcher.poll())
"""


def output(program, *words):
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=20).stdout


def test_a_launcher_is_ended_with_all_below_it():
    assert output(END) == "137 True\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [(["bash", "-c", "exit 4"], 4), (["bash", "-c", "kill -USR1 $$"], 138), (["/nowhere/x"], 127), ([sys.prefix], 126)],
)
def test_codes_of_launchers(words, code):
    assert output(CODE, json.dumps(words)) == f"{code}\n"


def test_a_clock_that_was_not_looked_at_has_not_watched():
    clock = WatchClock(most=0.05)
    time.sleep(0.3)
    assert 0.04 < clock.now() < 0.06
    begun = time.monotonic()
    for _ in range(20):
        time.sleep(0.01)
        last = clock.now()
    assert last - 0.05 <= time.monotonic() - begun + 0.02
    assert last > 0.2
