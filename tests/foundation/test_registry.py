import sys

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.registry import Registry


@pytest.fixture
def ops():
    registry = Registry("op")
    registry.register("rms_norm")(1)
    registry.register("layer_norm")(2)
    return registry


def test_members_by_name_in_alphabetical_order(ops):
    assert list(ops) == ["layer_norm", "rms_norm"]
    assert list(ops.items()) == [("layer_norm", 2), ("rms_norm", 1)]
    assert (ops["rms_norm"], len(ops), "rope" in ops) == (1, 2, False)


def test_decorator_returns_what_it_decorates(ops):
    @ops.register("rope")
    def rope():
        return 3

    assert rope() == 3
    assert ops["rope"] is rope


def test_name_taken(ops):
    with pytest.raises(ValueError, match="two ops are named 'rms_norm': 1 and 9"):
        ops.register("rms_norm")(9)
    assert ops["rms_norm"] == 1


def test_unknown_name_gives_close_ones_and_all(ops):
    with pytest.raises(UserError, match=r"unknown op 'rmsnorm' \(did you mean rms_norm\?\); known ops: lay"):
        ops["rmsnorm"]
    with pytest.raises(UserError, match=r"unknown op 'zzz'; known ops: layer_norm, rms_norm$"):
        ops["zzz"]
    with pytest.raises(UserError, match="known stages: none"):
        Registry("stage")["any"]


def test_package_is_scanned_at_the_first_lookup(tmp_path, monkeypatch):
    package = tmp_path / "scanned_members"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from megatron_ru.foundation.registry import Registry\nMEMBERS = Registry('member', package=__name__)\n"
    )
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(
            f"from scanned_members import MEMBERS\n@MEMBERS.register({name!r})\ndef member(): return {name!r}\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    from scanned_members import MEMBERS

    assert "scanned_members.one" not in sys.modules
    assert {name: member() for name, member in MEMBERS.items()} == {"one": "one", "two": "two"}
