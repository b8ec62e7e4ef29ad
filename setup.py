"""Build entry point; the metadata lives in pyproject.toml.

A wheel carries the sources of csrc/ as megatron_ru/csrc. Where torch can be imported while it is built (pip's
isolation hides it: `pip install --no-build-isolation .`), it carries the compiled ops for that torch too; elsewhere
`megatron-ru build` compiles them after the installation. MEGATRON_RU_BUILD=none leaves them out.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

PROJECT = Path(__file__).resolve().parent
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")


def compiled_ops() -> Path | None:
    """The library for the torch of the build environment; None where there is no torch, no compiler or no wish."""
    kind = os.environ.get("MEGATRON_RU_BUILD") or "auto"
    if kind == "none" or importlib.util.find_spec("torch") is None:
        return None
    sys.path.insert(0, str(PROJECT))
    from megatron_ru.foundation.errors import UserError
    from megatron_ru.ops.build import build

    try:
        return build(kind, say=lambda line: print(f"megatron-ru: {line}", file=sys.stderr)).path
    except UserError as error:
        if kind != "auto":
            raise SystemExit(f"megatron-ru: error: {error}") from error
        print(f"megatron-ru: warning: the wheel carries no compiled ops: {error}", file=sys.stderr)
        return None


class BuildWithOps(build_py):
    """Adds the sources of the ops, and the library where one was built."""

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return
        package = Path(self.build_lib) / "megatron_ru"
        for source in sorted((PROJECT / "csrc").rglob("*")):
            if source.suffix in SUFFIXES:
                target = package / "csrc" / source.relative_to(PROJECT / "csrc")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        if LIBRARY is not None:
            target = package / "ops/_compiled" / LIBRARY.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(LIBRARY, target)


class DistributionWithOps(Distribution):
    """Says that the wheel is for this platform when it carries a library."""

    def has_ext_modules(self) -> bool:
        return LIBRARY is not None or super().has_ext_modules()


LIBRARY = compiled_ops() if {"bdist_wheel", "build", "install"} & set(sys.argv) else None

if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithOps}, distclass=DistributionWithOps)
