"""Acting on a module when it is imported."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys

import pytest

from megatron_ru.seams.when_imported import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`when_pkg.sub.leaf` on sys.path, not yet imported; it notes in `seen` what it finds while it is executed."""
    folder = tmp_path / "when_pkg" / "sub"
    folder.mkdir(parents=True)
    (tmp_path / "when_pkg" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "leaf.py").write_text("value = 1\ndef double(x):\n    return 2 * x\n")
    (folder / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    finders = list(sys.meta_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "when_pkg"]:
        del sys.modules[name]
    assert sys.meta_path == finders, "a finder was left behind"


def test_a_loaded_module_is_met_at_once(package):
    import when_pkg.sub.leaf as leaf

    seen = []
    undo = when_imported("when_pkg.sub.leaf", seen.append)
    assert seen == [leaf]
    undo()


def test_a_module_is_met_when_it_is_loaded_and_is_whole_then(package):
    seen = []
    when_imported("when_pkg.sub.leaf", lambda module: seen.append((module, module.double(4))))
    assert not seen

    assert not seen
    assert "when_pkg.sub.leaf" not in sys.modules
    import when_pkg.sub.leaf as leaf

    assert seen == [(leaf, 8)]
    importlib.reload(leaf)
    assert len(seen) == 1


def test_from_import_sees_the_change(package):
    def change(module):
        module.value = 2

    when_imported("when_pkg.sub.leaf", change)
    from when_pkg.sub.leaf import value

    assert value == 2


def test_from_a_package_import_a_module(package):
    seen = []
    when_imported("when_pkg.sub.leaf", seen.append)
    from when_pkg.sub import leaf

    assert seen == [leaf]


def test_a_package_is_met_before_its_modules(package):
    order = []
    when_imported("when_pkg.sub.leaf", lambda module: order.append(module.__name__))
    when_imported("when_pkg.sub", lambda module: order.append(module.__name__))
    import when_pkg.sub.leaf  # noqa: F401

    assert order == ["when_pkg.sub", "when_pkg.sub.leaf"]


def test_two_may_wait_for_one_module(package):
    order = []
    when_imported("when_pkg.sub.leaf", lambda module: order.append("first"))
    when_imported("when_pkg.sub.leaf", lambda module: order.append("second"))
    import when_pkg.sub.leaf  # noqa: F401

    assert sorted(order) == ["first", "second"]


def test_undo_stops_the_waiting(package):
    seen = []
    undo = when_imported("when_pkg.sub.leaf", seen.append)
    undo()
    undo()
    import when_pkg.sub.leaf as leaf

    assert not seen
    assert isinstance(leaf.__loader__, importlib.machinery.SourceFileLoader)


def test_the_module_looks_as_if_nobody_had_waited(package):
    when_imported("when_pkg.sub.leaf", lambda module: None)
    import when_pkg.sub.leaf as leaf

    assert isinstance(leaf.__loader__, importlib.machinery.SourceFileLoader)
    assert leaf.__spec__.loader is leaf.__loader__
    assert leaf.__file__ == str(package / "when_pkg" / "sub" / "leaf.py")
    assert "return 2 * x" in inspect.getsource(leaf.double)


def test_looking_for_the_module_is_not_importing_it(package):
    seen = []
    when_imported("when_pkg.sub.leaf", seen.append)
    assert importlib.util.find_spec("when_pkg.sub.leaf") is not None
    assert not seen
    import when_pkg.sub.leaf as leaf

    assert seen == [leaf]


def test_a_module_that_appears_later_is_met(package):
    seen = []
    when_imported("when_pkg.sub.later", seen.append)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'when_pkg.sub.later'"):
        importlib.import_module("when_pkg.sub.later")
    (package / "when_pkg" / "sub" / "later.py").write_text("value = 3\n")
    importlib.invalidate_caches()
    assert importlib.import_module("when_pkg.sub.later").value == 3
    assert [module.value for module in seen] == [3]


def test_a_module_that_breaks_is_not_met(package):
    seen = []
    undo = when_imported("when_pkg.sub.broken", seen.append)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("when_pkg.sub.broken")
    assert not seen
    assert "when_pkg.sub.broken" not in sys.modules
    undo()


def test_an_error_of_ours_is_the_error_of_the_import(package):
    def refuse(module):
        raise RuntimeError("moved")

    when_imported("when_pkg.sub.leaf", refuse)
    with pytest.raises(RuntimeError, match="moved"):
        importlib.import_module("when_pkg.sub.leaf")
