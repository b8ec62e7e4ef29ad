"""Which form of an op runs, and what is said when it is the plain one."""

import logging

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import backend, library

NAMES = {
    "activation", "adamw", "cross_entropy", "embedding", "gradient_guard", "layer_norm", "linear_cross_entropy",
    "rms_norm", "rope",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _every_op_is_on():
    with backend.only("all"):
        yield


def test_known_names_are_the_switches():
    assert backend.known() == NAMES
    assert set(backend.selected()) == NAMES


def test_select_switches_on_those_and_no_others():
    backend.select("rope, rms_norm")
    assert backend.selected() == ("rms_norm", "rope")
    assert backend.switch("rope").on
    assert not backend.switch("adamw").on
    backend.select("none")
    assert backend.selected() == ()
    assert not backend.switch("rope").on
    backend.select("all")
    assert backend.switch("adamw").on


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rope,swish", "--ru-ops names swish; expected all, none or some of activation,adamw,cross_entropy,"
         "embedding,gradient_guard,layer_norm,linear_cross_entropy,rms_norm,rope"),
        ("", "--ru-ops names nothing; expected"),
        ("all,rope", "--ru-ops all,rope: `all` and `none` stand alone; leave the other names out"),
    ],
)  # fmt: skip
def test_wrong_words(words, message):
    with pytest.raises(UserError) as error:
        backend.select(words)
    assert str(error.value).startswith(message)
    assert set(backend.selected()) == NAMES


def test_only_takes_back_what_it_selected():
    backend.select("rope")
    with backend.only("none"):
        assert backend.selected() == ()
    assert backend.selected() == ("rope",)
    with pytest.raises(RuntimeError), backend.only("adamw"):
        raise RuntimeError
    assert backend.selected() == ("rope",)


def test_switch_made_later_heeds_the_selection():
    backend.select("rope")
    assert not backend.Switch("later", on=False).on
    assert backend.switch("rope") is backend.switch("rope")


def test_takes(monkeypatch):
    switch = backend.Switch("some", on=True)
    monkeypatch.setattr(backend, "_LOADED", True)
    assert switch.takes(torch.ones(1))
    assert switch.takes(torch.ones(1, dtype=torch.float64))
    assert not switch.takes(torch.ones(1, dtype=torch.int64))
    assert switch.takes(torch.ones(1, dtype=torch.int64), frozenset((torch.int64,)))
    assert not switch.takes(torch.ones(1, device="meta"))
    switch.on = False
    assert not switch.takes(torch.ones(1))
    switch.on = True
    monkeypatch.setattr(backend, "_LOADED", False)
    assert not switch.takes(torch.ones(1))


def test_fallback_is_told_once_for_each_reason(caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    switch = backend.Switch("some", on=True)
    x = torch.ones(1, dtype=torch.int64)
    with caplog.at_level(logging.DEBUG, logger=backend.__name__):
        for _ in range(3):
            switch.fell_back(x, "the first reason")
        switch.fell_back(x, "the second reason")
    assert [record.getMessage() for record in caplog.records] == [
        "megatron-ru: op some runs in plain torch: the first reason",
        "megatron-ru: op some runs in plain torch: the second reason",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_other_ranks_tell_it_in_debug_only(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with caplog.at_level(logging.DEBUG, logger=backend.__name__):
        backend.Switch("some", on=True).fell_back(torch.ones(1), "a reason")
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_nothing_is_said_of_what_was_switched_off_or_has_no_data(caplog):
    switch = backend.Switch("some", on=False)
    with caplog.at_level(logging.DEBUG, logger=backend.__name__):
        switch.fell_back(torch.ones(1))
        switch.on = True
        switch.fell_back(torch.ones(1, device="meta"), "no data")
    assert caplog.records == []


def test_reasons(monkeypatch, tmp_path):
    switch = backend.Switch("some", on=True)
    loaded = library.LibraryStatus(path=tmp_path / "ops.so", reason="", cuda=False)
    monkeypatch.setattr(backend, "_LIBRARY", loaded)
    backend._why_no_cuda.cache_clear()
    try:
        assert switch.why_not("cpu") == ""
        assert switch.why_not("cpu", torch.int32) == "torch.int32 on cpu has no kernel"
        assert switch.why_not("xpu") == "there are kernels for CPU and CUDA, none for xpu"
        assert switch.why_not("cuda") == "ops.so holds CPU ops alone: run `megatron-ru build --kind cuda`"
        monkeypatch.setattr(backend, "_LIBRARY", library.LibraryStatus(path=None, reason="none was built"))
        assert switch.why_not("cpu") == "none was built"
        switch.on = False
        assert switch.why_not("cpu") == "switched off by --ru-ops"
    finally:
        backend._why_no_cuda.cache_clear()


@pytest.mark.parametrize(("capability", "usable"), [((7, 0), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)])
def test_gpu_older_than_the_library(monkeypatch, tmp_path, capability, usable):
    loaded = library.LibraryStatus(path=tmp_path / "ops.so", reason="", cuda=True, archs=(80, 90))
    monkeypatch.setattr(backend, "_LIBRARY", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    backend._why_no_cuda.cache_clear()
    try:
        reason = backend.Switch("some", on=True).why_not("cuda")
        assert (reason == "") == usable
        if not usable:
            assert reason == (
                "the GPU is an sm_70 and the library was built for sm_80, sm_90: "
                "run `megatron-ru build --kind cuda --archs 70`"
            )
    finally:
        backend._why_no_cuda.cache_clear()


def test_ops_without_a_library_run_in_plain_torch(caplog):
    """The real functions, where nothing was compiled."""
    import os
    import subprocess
    import sys

    program = (
        "import torch\n"
        "from megatron_ru.ops import backend\n"
        "from megatron_ru.ops.rms_norm import rms_norm\n"
        "print(backend.library_status().path)\n"
        "for _ in range(2):\n"
        "    print(rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0).mul(12.5 ** 0.5).tolist())\n"
    )
    environ = {**os.environ, "MEGATRON_RU_LIBRARY": "nowhere.so"}
    shown = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    lines = shown.stdout.splitlines()
    assert lines[0] == "None"
    assert lines[1] == lines[2]
    assert shown.stderr.count("op rms_norm runs in plain torch: nowhere.so cannot be loaded") == 1
