"""The compiled library of ops: which file it is, whether it is loaded, and if not, why."""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ru import __version__
from megatron_ru.ops.build import output_folders, source_hash, sources_folder

PATH_VARIABLE = "MEGATRON_RU_LIBRARY"
_NAME = re.compile(
    r"megatron_ru_ops-(?P<package>[^-]+)-torch(?P<torch>[^-]+)-(?P<kind>cpu|cuda)[_\d]*-(?P<sources>\w+)\.so"
)
_REMEDY = "run `megatron-ru build`"


@dataclass(frozen=True, kw_only=True)
class LibraryStatus:
    """Which compiled library this process uses."""

    path: Path | None
    """The loaded file; None when the plain torch forms are all there is."""
    reason: str
    """Why this file, or why none."""
    cuda: bool = False
    """Whether it holds CUDA kernels beside those for the CPU, which every library has."""
    archs: tuple[int, ...] = ()
    """Compute capabilities of its CUDA code."""
    torch_version: str = torch.__version__

    def summary(self) -> str:
        """One line for a log."""
        if self.path is None:
            return f"no compiled ops: {self.reason}"
        kernels = "CPU and CUDA" if self.cuda else "CPU"
        archs = " for " + ", ".join(f"sm_{arch}" for arch in self.archs) if self.archs else ""
        return f"{kernels} ops{archs} of {self.path} ({self.reason})"


@functools.cache
def load() -> LibraryStatus:
    """Loads the library, once in a process, and says what came of it. Never raises."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        path: Path | None = Path(named)
        reason = f"named by {PATH_VARIABLE}"
    else:
        path, reason = find_library()
    if path is None:
        return LibraryStatus(path=None, reason=reason)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return LibraryStatus(path=None, reason=f"{path} cannot be loaded: {error}")
    # "cpu", or "cuda 80,90": the file's name may be anything when the user gave it.
    kind, _, archs = torch.ops.megatron_ru.build_info().partition(" ")
    return LibraryStatus(
        path=path,
        reason=reason,
        cuda=kind == "cuda",
        archs=tuple(int(arch) for arch in archs.split(",") if arch),
    )


def find_library() -> tuple[Path | None, str]:
    """The newest library for this package, this torch and these sources, or None; and why."""
    found = []
    others = []
    sources = sources_folder()
    wanted = {kind: source_hash(sources, kind) for kind in ("cpu", "cuda")} if sources is not None else None
    for folder in output_folders():
        for path in folder.glob("megatron_ru_ops-*.so"):
            parts = _NAME.fullmatch(path.name)
            if parts is None or parts["package"] != __version__:
                continue
            if parts["torch"] != torch.__version__:
                others.append((path, f"{path.name} is for torch {parts['torch']}, and this is {torch.__version__}"))
            elif wanted is not None and parts["sources"] != wanted[parts["kind"]]:
                others.append((path, f"the sources have changed since {path.name} was built"))
            else:
                found.append(path)
    if found:
        return max(found, key=lambda path: path.stat().st_mtime_ns), "built for this torch and these sources"
    if others:
        _, why = max(others, key=lambda other: other[0].stat().st_mtime_ns)
        return None, f"{why}: {_REMEDY}"
    return None, f"none has been built for torch {torch.__version__}: {_REMEDY}"


def operator(name: str) -> Any:
    """The default overload of `torch.ops.megatron_ru.<name>`, or None when no library is loaded."""
    if load().path is None:
        return None
    packet = getattr(torch.ops.megatron_ru, name, None)
    return None if packet is None else packet.default
