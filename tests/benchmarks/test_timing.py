import itertools
import time

import torch

from megatron_ru.benchmarks.timing import CLOCKS, QueuedClock, WallClock, _calls, host_microseconds


class Sleeps:
    """Steps that sleep, and how many were asked for and made."""

    def __init__(self, seconds, rotation=2, most=100):
        self.rotation, self.most = rotation, most
        self.seconds = seconds
        self.asked = []
        self.made = 0

    def steps(self, count):
        self.asked.append(count)
        return [self.step] * count

    def step(self):
        self.made += 1
        time.sleep(self.seconds)


def test_wall_clock_gives_the_time_of_one_call():
    source = Sleeps(2e-3)
    found = WallClock().measure(source, seconds=0.05)
    assert 2000 <= found.microseconds < 50_000
    assert found.repeats >= 3
    # Every step that was prepared is called once.
    assert source.made == sum(source.asked)


def test_a_repeat_goes_through_every_input_set():
    source = Sleeps(5e-3, rotation=4)
    assert WallClock().measure(source, seconds=0.01).iterations == 4


def test_no_more_steps_than_fit_into_memory():
    assert _calls(1e-6, Sleeps(0.0, rotation=2, most=3)) == 3
    # A short call is repeated so often that the resolution of a clock does not matter, within limits.
    assert _calls(1e-6, Sleeps(0.0, rotation=2)) == 32
    assert _calls(1e-3, Sleeps(0.0, rotation=2)) == 2


class Gpu:
    """Torch's CUDA calls for a GPU that takes as long as the host, and notes its spins."""

    def __init__(self, monkeypatch):
        self.spins = []
        self.synchronised = 0
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spins.append)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def synchronize(self):
        self.synchronised += 1


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_queue_is_filled_while_the_gpu_spins(monkeypatch):
    gpu = Gpu(monkeypatch)
    found = QueuedClock().measure(Sleeps(1e-3, rotation=3), seconds=0.02)
    assert 1000 <= found.microseconds < 50_000
    # Half again as long as the host needs for the three calls, at two cycles a nanosecond; not in the warm-up.
    assert len(gpu.spins) == found.repeats
    assert all(1.5 * 3 * 1e-3 * 2e9 <= cycles <= 0.1 * 2e9 for cycles in gpu.spins)


def test_calls_of_the_host_do_not_wait_for_a_spin(monkeypatch):
    gpu = Gpu(monkeypatch)
    CLOCKS["launched"]().measure(Sleeps(1e-4), seconds=0.01)
    assert gpu.spins == []


def test_host_time_is_the_median_of_single_calls(monkeypatch):
    gpu = Gpu(monkeypatch)
    # One call in five is slow, as when memory is handed out anew.
    pauses = itertools.cycle([1e-3, 1e-3, 2e-2, 1e-3, 1e-3])
    found = host_microseconds(lambda: time.sleep(next(pauses)), seconds=0.2)
    assert 1000 <= found < 15_000
    assert gpu.synchronised >= 2


def test_names_are_those_of_the_command():
    assert set(CLOCKS) == {"queued", "graph", "launched"}
