"""Megatron's compiled index helpers, built from a source as a checkout has it."""

import importlib
import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import megatron.core.datasets
import numpy as np
import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin import dataset_helpers
from megatron_ru.plugin.dataset_helpers import (
    dataset_helper_seams,
    ensure_dataset_helpers,
    load_built_dataset_helpers,
)

NAME = "megatron.core.datasets.helpers_cpp"
SOURCE = """
#include <pybind11/pybind11.h>
int answer() { return %d; }
PYBIND11_MODULE(helpers_cpp, m) { m.def("answer", &answer); }
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Megatron's package of datasets with a source and nothing compiled, and an empty cache."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "helpers.cpp").write_text(SOURCE % 42)
    monkeypatch.setattr(megatron.core.datasets, "__path__", [str(folder)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.delattr(megatron.core.datasets, "helpers_cpp", raising=False)
    return folder


def libraries(tmp_path):
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_compiled_once_into_the_cache_and_reused(tmp_path):
    # In processes of their own: an extension module stays in the process that has loaded it.
    folder = tmp_path / "checkout" / "megatron" / "core" / "datasets"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    (folder / "helpers.cpp").write_text(SOURCE % 42)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "checkout"), "PYTHONDONTWRITEBYTECODE": "1",
               "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
    environ.pop("CXX", None)

    def answer(call, **more):
        code = (
            "from megatron_ru.plugin.dataset_helpers import ensure_dataset_helpers, load_built_dataset_helpers\n"
            f"{call}()\n{call}()\n"
            "from megatron.core.datasets.helpers_cpp import answer\n"
            "print(answer())"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**environ, **more}, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    # A rank that must not compile does not.
    assert "No module named 'megatron.core.datasets.helpers_cpp'" in answer("load_built_dataset_helpers")
    assert answer("ensure_dataset_helpers") == "42"
    [library] = libraries(tmp_path)
    assert library.parent.parent == tmp_path / "cache" / "megatron_ru" / "dataset_helpers"
    assert library.name == "helpers_cpp" + importlib.machinery.EXTENSION_SUFFIXES[0]
    assert sorted(path.name for path in folder.iterdir()) == ["__init__.py", "helpers.cpp"], (
        "the checkout was written to"
    )
    # The cache answers, where nothing could compile.
    built = library.stat().st_mtime_ns
    assert answer("load_built_dataset_helpers", CXX="/no/compiler") == "42"
    assert answer("ensure_dataset_helpers", CXX="/no/compiler") == "42"
    assert library.stat().st_mtime_ns == built


def test_another_source_has_another_library(checkout, tmp_path):
    first = dataset_helpers._cache_path(checkout / "helpers.cpp")
    (checkout / "helpers.cpp").write_text(SOURCE % 43)
    second = dataset_helpers._cache_path(checkout / "helpers.cpp")
    assert first != second
    assert first.parent.parent == second.parent.parent


def test_ranks_that_come_later_do_not_compile(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_helpers, "_compile", lambda *_: pytest.fail("compiled"))
    load_built_dataset_helpers()
    assert NAME not in sys.modules


def test_every_rank_has_them_and_one_of_a_host_compiles(checkout, monkeypatch):
    done = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(dataset_helpers, "ensure_dataset_helpers", lambda: done.append("ensure"))
    monkeypatch.setattr(dataset_helpers, "load_built_dataset_helpers", lambda: done.append("load"))
    (_, seam) = dataset_helper_seams()
    for rank, wanted in (("0", ["original", "ensure", "barrier", "load"]), ("1", ["original", "barrier", "load"])):
        done.clear()
        monkeypatch.setenv("LOCAL_RANK", rank)
        seam.make(lambda: done.append("original"))()
        assert done == wanted


def test_without_a_compiler(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError) as error:
        ensure_dataset_helpers()
    assert str(error.value) == (
        "Megatron's dataset index helpers must be compiled and no C++ compiler was found; install one, for example "
        "with: apt install g++"
    )
    assert not libraries(tmp_path)


def test_a_compiler_that_fails_leaves_nothing(checkout, tmp_path, monkeypatch):
    compiler = tmp_path / "broken-cxx"
    compiler.write_text("#!/bin/sh\necho starting >&2\necho 'fatal: no space left' >&2\nexit 4\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UserError) as error:
        ensure_dataset_helpers()
    source = checkout / "helpers.cpp"
    assert str(error.value) == f"{compiler} could not compile {source} (exit code 4): fatal: no space left"
    assert not libraries(tmp_path)


def test_a_compiler_that_is_not_there(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere .*C\+\+ compiler"):
        ensure_dataset_helpers()
    assert not libraries(tmp_path)


def test_a_cache_that_is_a_file(checkout, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can be written"):
        ensure_dataset_helpers()


def test_without_xdg_the_cache_is_in_the_home(checkout, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = dataset_helpers._cache_path(checkout / "helpers.cpp")
    assert found.is_relative_to(tmp_path / ".cache" / "megatron_ru" / "dataset_helpers")


def test_the_wheel_s_own_are_used_when_they_are_there(monkeypatch):
    monkeypatch.setattr(dataset_helpers, "_compile", lambda *_: pytest.fail("compiled"))
    ensure_dataset_helpers()
    module = importlib.import_module(NAME)
    assert Path(module.__file__).parent == Path(next(iter(megatron.core.datasets.__path__)))
    # Two documents of 3 tokens and one of 2, sequences of 3: where each sample starts.
    sizes, documents = np.array([3, 3, 2], dtype=np.int32), np.arange(3, dtype=np.int32)
    index = module.build_sample_idx_int32(sizes, documents, 3, 1, 8, True, 1)
    assert index.tolist() == [[0, 0], [1, 0], [2, 0]]


def test_the_seam(cpu_device):
    from megatron.core.datasets import utils

    [seam, _] = dataset_helper_seams()
    original = utils.compile_helpers
    seam.install()
    assert utils.compile_helpers is ensure_dataset_helpers
    seam.undo()
    assert utils.compile_helpers is original
