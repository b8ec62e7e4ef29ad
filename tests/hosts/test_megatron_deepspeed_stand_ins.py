"""Modules that the host imports and does not find: stand-ins that say so when they are called."""

import importlib
import sys
from types import ModuleType

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts import megatron_deepspeed_stand_ins as stand_ins


@pytest.fixture
def table(monkeypatch):
    """A table of one module that needs another, in a package that is there."""
    monkeypatch.setitem(sys.modules, "host_for_test", ModuleType("host_for_test"))
    sys.modules["host_for_test"].__path__ = []
    sentence = "monitors need eyes, which are not installed"
    monkeypatch.setattr(stand_ins, "_STAND_INS", {"host_for_test.monitor": ("eyes_for_test", ("watch",), sentence)})
    yield sentence
    stand_ins.stop_standing_in()
    sys.modules.pop("host_for_test.monitor", None)


def test_a_missing_module_is_found_and_refuses_to_work(table):
    stand_ins.stand_in_for_missing_modules()
    module = importlib.import_module("host_for_test.monitor")
    with pytest.raises(UserError) as error:
        module.watch(1, at="night")
    assert str(error.value) == table
    with pytest.raises(ImportError):
        importlib.import_module("host_for_test.other")
    stand_ins.stop_standing_in()
    assert "host_for_test.monitor" not in sys.modules
    with pytest.raises(ImportError):
        importlib.import_module("host_for_test.monitor")


def test_a_module_that_is_there_stays(table, tmp_path, monkeypatch):
    (tmp_path / "eyes_for_test.py").write_text("")
    (tmp_path / "monitor.py").write_text("watch = 'real'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules["host_for_test"].__path__ = [str(tmp_path)]
    stand_ins.stand_in_for_missing_modules()
    assert importlib.import_module("host_for_test.monitor").watch == "real"


def test_the_modules_of_the_host():
    assert set(stand_ins._STAND_INS) == {"megatron.model.vision.knn_monitor", "deepspeed.compression.compress"}
