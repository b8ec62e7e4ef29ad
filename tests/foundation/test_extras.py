import json

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require


def test_installed_module_is_returned():
    assert require("json", feature="reading", extra="data") is json


def test_missing_module_names_feature_and_command():
    with pytest.raises(UserError) as raised:
        require("no_such_module.part", feature="the loss curve", extra="demo")
    assert str(raised.value) == (
        "the loss curve needs the Python package 'no_such_module', which is not installed: "
        "pip install 'megatron-ru[demo]'"
    )


def test_missing_dependency_of_an_installed_module_is_not_blamed_on_the_extra(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_installed", feature="the loss curve", extra="demo")
