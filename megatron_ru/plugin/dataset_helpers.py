"""Megatron's compiled dataset index helpers, for the Python that is running.

The wheel of megatron-core carries them compiled; a Megatron-LM checkout compiles them with a Makefile that asks
PATH's `python3`, which may be another Python, and writes into the checkout. Here they are compiled once per source
and interpreter into the user's cache.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.seam import Seam

_MODULE = "megatron.core.datasets.helpers_cpp"


def dataset_helper_seams() -> list[Seam]:
    """The seams on Megatron's `compile_helpers`, which rank 0 calls, and on what all ranks call around it."""
    return [
        Seam(
            target="megatron.core.datasets.utils:compile_helpers",
            make=lambda _: ensure_dataset_helpers,
            reason="its Makefile builds for the python3 of PATH and is missing from the wheel",
        ),
        Seam(
            target="megatron.training.initialize:_compile_dependencies",
            make=_on_every_rank,
            reason="the other ranks look for what rank 0 has compiled in the checkout, on its host",
        ),
    ]


def _on_every_rank(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_dependencies() -> None:
        import torch

        original()
        # The cache of rank 0 may be on a disk of its host.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            ensure_dataset_helpers()
        torch.distributed.barrier()
        load_built_dataset_helpers()

    return compile_dependencies


def ensure_dataset_helpers() -> None:
    """Makes `megatron.core.datasets.helpers_cpp` importable in this process; compiles it when nobody has."""
    _load(build=True)


def load_built_dataset_helpers() -> None:
    """The same for ranks that must not compile: they come after the rank that has."""
    _load(build=False)


def _load(build: bool) -> None:
    if _MODULE in sys.modules or _is_importable():
        return
    import megatron.core.datasets

    load_helpers(_MODULE, Path(next(iter(megatron.core.datasets.__path__))) / "helpers.cpp", build=build)


def load_helpers(name: str, source: Path, *, build: bool) -> None:
    """Makes the module `name` of this process from the C++ file `source`, compiled into the cache by whoever may
    `build`; without a compiled one there, others do nothing."""
    library = _cache_path(source, name.rpartition(".")[2])
    if not library.exists():
        if not build:
            return
        _compile(source, library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def _is_importable() -> bool:
    try:
        importlib.import_module(_MODULE)
    except ImportError:
        return False
    return True


def _cache_path(source: Path, name: str = "helpers_cpp") -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ru" / "dataset_helpers"
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return folder / key / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _compile(source: Path, library: Path) -> None:
    import pybind11

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise UserError(
            "Megatron's dataset index helpers must be compiled and no C++ compiler was found; install one, for "
            "example with: apt install g++"
        )
    if shutil.which(compiler) is None:
        raise UserError(f"CXX={compiler} is not a program, expected a C++ compiler such as g++; correct or unset it")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=library.parent, suffix=".partial")
    except OSError as error:
        raise UserError(
            f"{library.parent} cannot hold Megatron's dataset index helpers ({error.strerror}); set XDG_CACHE_HOME to "
            "a folder that can be written"
        ) from error
    os.close(descriptor)
    command = [
        compiler, "-O3", "-shared", "-std=c++17", "-fPIC", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}", str(source), "-o", partial,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        os.unlink(partial)
        raise UserError(
            f"{compiler} could not compile {source} (exit code {done.returncode}): "
            f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}"
        )
    os.replace(partial, library)
