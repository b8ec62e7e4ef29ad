"""Where things lie in a folder of checkpoints, under Megatron's names and ours.

latest_checkpointed_iteration.txt    the tracker: the iteration to load, or `release`
iter_0000100/                        a checkpoint; with ru_manifest.json it is one of ours
.iter_0000200.saving/                is being written, or was when the run was killed
.iter_0000050.removed/               is being deleted
.iter_0000100.replaced/              makes room for a newer save of the same iteration
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_ru.foundation.files import atomic_output

TRACKER = "latest_checkpointed_iteration.txt"

Kind = Literal["saving", "removed", "replaced"]


@dataclass(frozen=True)
class Tracker:
    """What the tracker says."""

    text: str | None
    """Its content without blanks around, None where there is no such file."""

    @property
    def iteration(self) -> int | None:
        """The iteration that it names, None for `release` and for a torn file."""
        known = self.text is not None and self.text.isascii() and self.text.isdecimal()
        return int(self.text) if known and self.text is not None else None

    @property
    def release(self) -> bool:
        """Whether it names the folder `release`: weights without an iteration."""
        return self.text == "release"

    @property
    def torn(self) -> bool:
        """Whether it is there and names nothing."""
        return self.text is not None and self.iteration is None and not self.release


@dataclass(frozen=True, kw_only=True)
class Aside:
    """A folder of ours that is no checkpoint."""

    path: Path
    iteration: int
    kind: Kind


def name_of(iteration: int) -> str:
    """Megatron's name for the folder of an iteration."""
    return f"iter_{iteration:07d}"


def iterations(folder: Path) -> list[int]:
    """The iterations that have a folder here, whole or not, in ascending order."""
    found = (re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in _entries(folder))
    return sorted(int(match[1]) for match in found if match is not None)


def place_aside(folder: Path, iteration: int, kind: Kind) -> Path:
    """The folder that an iteration has while it is written or on its way out."""
    return folder / f".{name_of(iteration)}.{kind}"


def asides(folder: Path) -> list[Aside]:
    """What was left between two names."""
    pattern = re.compile(rf"\.iter_(\d{{7,}})\.({'|'.join(get_args(Kind))})")
    found = ((entry, pattern.fullmatch(entry.name)) for entry in _entries(folder))
    return [
        Aside(path=Path(entry.path), iteration=int(match[1]), kind=match[2])  # type: ignore[arg-type]
        for entry, match in found
        if match is not None
    ]


def read_tracker(folder: Path) -> Tracker:
    """The tracker of a folder, which may be absent."""
    try:
        return Tracker((folder / TRACKER).read_bytes().decode("utf-8", "replace").strip())
    except (FileNotFoundError, NotADirectoryError):
        return Tracker(None)


def write_tracker(folder: Path, iteration: int) -> None:
    """Lets the tracker name the iteration; a kill leaves the old file or the new one."""
    with atomic_output(folder / TRACKER, "w") as stream:
        stream.write(str(iteration))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
