"""Checksums in the process that writes a checkpoint while training goes on."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ru.checkpoints.checksums import FileSum, sum_files


def write_and_sum(write: Callable[..., Any], folder: str, rank: int, *arguments: Any, **keywords: Any) -> Any:
    """What `write` returns; then the sums of this rank's files are left beside them, for `read_sums`.

    Without them the training process sums by itself, so no failure of this is one of the save.
    """
    result = write(*arguments, **keywords)
    place = Path(folder)
    with suppress(OSError):
        sums = sum_files(place, [path.name for path in place.glob(f"__{rank}_*")], threads=1)
        _file(place, rank).write_text(json.dumps([asdict(file) for file in sums]))
    return result


def read_sums(place: Path, rank: int) -> list[FileSum]:
    """The sums that the writing process of this rank left, which are gone afterwards; none where it left none."""
    path = _file(place, rank)
    try:
        found = json.loads(path.read_text())
        os.unlink(path)
        return [FileSum(**{**file, "crc32": tuple(file["crc32"])}) for file in found]
    except (OSError, ValueError, TypeError, KeyError):
        path.unlink(missing_ok=True)
        return []


def _file(place: Path, rank: int) -> Path:
    return place / f".ru_sums_{rank}.json"
