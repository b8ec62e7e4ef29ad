"""What is loaded beside a checkpoint."""

import threading

from megatron_ru.plugin import warm_up


def test_it_is_done_while_the_checkpoint_is_loaded(monkeypatch):
    began, done, used = threading.Event(), threading.Event(), []

    def use(device):
        used.append(device)
        began.set()
        assert done.wait(20)

    monkeypatch.setattr(warm_up, "_device", lambda: 3)
    monkeypatch.setattr(warm_up, "_use_device", use)
    (seam,) = warm_up.warm_up_seams()

    def load(folder):
        assert began.wait(20)
        return folder

    # The load returns though the thread has not finished.
    assert seam.make(load)("saved") == "saved"
    assert used == [3]
    done.set()


def test_what_fails_is_not_missed(monkeypatch):
    called = []

    def fail(device):
        called.append(device)
        raise RuntimeError("no device")

    monkeypatch.setattr(warm_up, "_use_device", fail)
    warm_up.warm_up(3)
    assert called == [3]


def test_on_the_cpu_there_is_nothing_to_warm_up(cpu_device, monkeypatch):
    assert warm_up._device() is None
    monkeypatch.setattr(warm_up.threading, "Thread", None)
    (seam,) = warm_up.warm_up_seams()
    assert seam.make(lambda folder: folder)("saved") == "saved"
