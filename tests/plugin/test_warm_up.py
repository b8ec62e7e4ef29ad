"""What is loaded beside a checkpoint."""

import threading

from megatron_ru.plugin import warm_up


def test_it_is_done_while_the_checkpoint_is_loaded(monkeypatch):
    began, done = threading.Event(), threading.Event()

    def loading():
        began.set()
        assert done.wait(20)

    monkeypatch.setattr(warm_up, "_load_helpers", loading)
    (seam,) = warm_up.warm_up_seams()

    def load(folder):
        assert began.wait(20)
        return folder

    # The load returns though the thread has not finished.
    assert seam.make(load)("saved") == "saved"
    done.set()


def test_what_fails_is_not_missed(monkeypatch):
    called = []

    def fail():
        called.append(threading.current_thread().name)
        raise RuntimeError("no device")

    monkeypatch.setattr(warm_up, "_load_helpers", fail)
    used = []
    monkeypatch.setattr(warm_up, "_use_device", used.append)
    warm_up.warm_up(None)
    warm_up.warm_up(3)
    assert called == ["MainThread"] * 2
    assert used == [3]


def test_on_the_cpu_there_is_no_device(cpu_device):
    assert warm_up._device() is None


def test_megatron_s_helpers_are_there_afterwards():
    import sys

    warm_up.warm_up(None)
    assert "megatron.core.datasets.helpers_cpp" in sys.modules
