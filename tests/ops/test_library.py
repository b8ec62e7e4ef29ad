"""Which compiled library is found, and why none."""

import os

import pytest
import torch

from megatron_ru import __version__
from megatron_ru.ops import build, library


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders in place of the package's and the cache's, and no sources."""
    found = (tmp_path / "package", tmp_path / "cache")
    for folder in found:
        folder.mkdir()
    monkeypatch.setattr(library, "output_folders", lambda: found)
    monkeypatch.setattr(library, "sources_folder", lambda: None)
    return found


def put(
    folder, kind="cpu", archs=(), torch_version=torch.__version__, sources="0" * 12, seconds=0, package=__version__
):
    path = folder / build.library_name(torch_version, kind, archs, sources).replace(__version__, package, 1)
    path.touch()
    os.utime(path, (seconds, seconds))
    return path


def test_none_was_built(folders):
    assert library.find_library() == (
        None,
        f"none has been built for torch {torch.__version__}: run `megatron-ru build`",
    )


def test_newest_is_taken_from_either_folder(folders):
    put(folders[0], seconds=100)
    newest = put(folders[1], "cuda", (80, 90), seconds=200)
    put(folders[0], sources="1" * 12, seconds=150)
    assert library.find_library() == (newest, "built for this torch and these sources")


def test_another_torch_does_not_fit(folders):
    other = put(folders[0], torch_version="1.0+cpu")
    path, reason = library.find_library()
    assert path is None
    assert reason == f"{other.name} is for torch 1.0+cpu, and this is {torch.__version__}: run `megatron-ru build`"


def test_another_package_version_is_not_even_spoken_of(folders):
    put(folders[0], package="9.9")
    assert library.find_library()[1].startswith("none has been built")


def test_sources_of_a_checkout_must_be_those(folders, tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "bindings.cpp").write_text("// one")
    (sources / "kernel.cu").write_text("// one")
    monkeypatch.setattr(library, "sources_folder", lambda: sources)
    both = {kind: put(folders[0], kind, sources=build.source_hash(sources, kind)) for kind in ("cpu", "cuda")}
    os.utime(both["cuda"], (1e9, 1e9))
    assert library.find_library()[0] == both["cuda"]
    # A changed CUDA file leaves the library of CPU ops as it is.
    (sources / "kernel.cu").write_text("// two")
    assert library.find_library()[0] == both["cpu"]
    (sources / "cpu" / "new.h").write_text("")
    path, reason = library.find_library()
    assert path is None
    assert reason == f"the sources have changed since {both['cuda'].name} was built: run `megatron-ru build`"


def test_named_library_is_tried_and_its_failure_told(tmp_path, monkeypatch):
    wrong = tmp_path / "ops.so"
    wrong.write_text("not a library")
    monkeypatch.setenv("MEGATRON_RU_LIBRARY", str(wrong))
    status = library.load.__wrapped__()
    assert status.path is None
    assert status.reason.startswith(f"{wrong} cannot be loaded: ")
    assert status.summary().startswith("no compiled ops: ")


def test_summary_names_kernels_and_architectures(tmp_path):
    status = library.LibraryStatus(path=tmp_path, reason="found", cuda=True, archs=(80, 90))
    assert status.summary() == f"CPU and CUDA ops for sm_80, sm_90 of {tmp_path} (found)"
    assert library.LibraryStatus(path=tmp_path, reason="found").summary() == f"CPU ops of {tmp_path} (found)"
