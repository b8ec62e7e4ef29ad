"""Seams on a module made for the test, and on the real megatron-core."""

import sys
from types import ModuleType

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.seam import Seam


class Base:
    def inherited(self):
        return "base"


class Widget(Base):
    def __init__(self, size):
        self.size = size

    def double(self, times=1):
        return self.size * 2**times

    @classmethod
    def name(cls):
        return cls.__name__


class Child(Widget):
    pass


def greet(name, *, loud=False):
    return f"hello {name}"


@pytest.fixture
def host(monkeypatch):
    """A package `host_package` of version 7.1 with a module `host_package.inside`."""
    package, inside = ModuleType("host_package"), ModuleType("host_package.inside")
    package.__path__, package.__version__ = [], "7.1"
    inside.greet, inside.Widget, inside.Child = greet, Widget, Child
    monkeypatch.setitem(sys.modules, "host_package", package)
    monkeypatch.setitem(sys.modules, "host_package.inside", inside)
    return inside


def seam(target="host_package.inside:greet", **changes):
    def make(original):
        return lambda *arguments, **keywords: f"<{original(*arguments, **keywords)}>"

    return Seam(**{"target": target, "make": make, "reason": "tests replace it", **changes})


def test_replaces_once_and_gives_back(host):
    s = seam()
    assert not s.installed
    assert s.install() is True
    assert s.installed
    assert host.greet("Ada") == "<hello Ada>"
    replaced = host.greet
    assert s.install() is True
    assert host.greet is replaced, "the second installation wrapped the first"
    s.undo()
    assert host.greet is greet
    assert not s.installed
    s.undo()
    assert host.greet is greet
    assert s.install()
    assert host.greet("Ada") == "<hello Ada>"


def test_stacked_seams_come_off_in_reverse(host):
    first, second = seam(), seam()
    first.install()
    second.install()
    assert host.greet("Ada") == "<<hello Ada>>"
    second.undo()
    assert host.greet("Ada") == "<hello Ada>"
    first.undo()
    assert host.greet is greet


def test_a_method_of_a_class(host):
    original = Widget.double
    s = seam("host_package.inside:Widget.double", expects=("self", "times"))
    s.install()
    assert Widget(3).double(times=2) == "<12>"
    assert Child(1).double() == "<2>"
    s.undo()
    assert Widget.double is original
    assert Widget(3).double() == 6


def test_an_inherited_method_is_not_left_behind_on_the_class(host):
    s = seam("host_package.inside:Widget.inherited")
    s.install()
    assert Widget(1).inherited() == "<base>"
    assert Base().inherited() == "base"
    s.undo()
    assert "inherited" not in vars(Widget)
    assert Widget(1).inherited() == "base"


def test_a_classmethod_is_a_classmethod_again(host):
    original = vars(Widget)["name"]
    s = seam("host_package.inside:Widget.name")
    s.install()
    assert Widget.name() == "<Widget>"
    s.undo()
    assert vars(Widget)["name"] is original
    assert Child.name() == "Child"


def test_missing_name_says_which_version(host):
    with pytest.raises(UserError) as error:
        seam("host_package.inside:farewell").install()
    assert str(error.value) == (
        "host_package.inside:farewell was not found in host_package 7.1: tests replace it. "
        "Use a version of megatron-core that docs/en/versions.md lists, or report this one."
    )


@pytest.mark.parametrize(
    ("target", "found_in"),
    [
        ("host_package.outside:greet", "host_package 7.1"),
        ("host_package.inside:Gadget.double", "host_package 7.1"),
        ("host_package.inside:Gadget.part.double", "host_package 7.1"),
        ("no_such_package.module:name", "no_such_package, which is not installed"),
        ("megatron.core.no_such_module:name", "megatron-core 0."),
    ],
)
def test_missing_modules_classes_and_packages(host, target, found_in):
    with pytest.raises(UserError, match=f"^{target} was not found in {found_in}"):
        seam(target).install()
    optional = seam(target, optional=True)
    assert optional.install() is False
    assert not optional.installed
    optional.undo()


def test_a_module_that_breaks_for_want_of_another_is_not_missing(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        seam("breaks_on_import:name", optional=True).install()


def test_moved_signature(host):
    s = seam(expects=("name", "language", "tone"))
    with pytest.raises(UserError) as error:
        s.install()
    assert str(error.value) == (
        "host_package.inside:greet of host_package 7.1 takes (name, loud), expected it to take language, tone too: "
        "tests replace it. Use a version of megatron-core that docs/en/versions.md lists, or report this one."
    )
    assert host.greet is greet
    assert not s.installed


def test_signature_that_takes_anything_or_more_is_fine(host):
    assert seam(expects=("name",)).install()
    # What is there now takes **keywords.
    assert seam(expects=("whatever",)).install()
    host.greet = greet


def test_a_replacement_that_cannot_be_made_leaves_the_name(host):
    def make(original):
        raise RuntimeError("no")

    s = seam(make=make)
    with pytest.raises(RuntimeError):
        s.install()
    assert host.greet is greet
    assert not s.installed


def test_on_the_real_megatron_core():
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.package_info import __version__

    original = GPTModel.__init__
    s = Seam(
        target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        make=lambda original: lambda self, *arguments, **keywords: None,
        expects=("config", "transformer_layer_spec", "vocab_size"),
        reason="tests",
    )
    assert s.install()
    assert GPTModel.__init__ is not original
    s.undo()
    assert GPTModel.__init__ is original
    moved = Seam(
        target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        make=lambda original: original,
        expects=("layer_recipe",),
        reason="tests",
    )
    with pytest.raises(UserError) as error:
        moved.install()
    version = __version__.partition("+")[0]
    assert f"of megatron-core {version} takes (self, config, transformer_layer_spec, " in str(error.value)
    assert "expected it to take layer_recipe too: tests" in str(error.value)
