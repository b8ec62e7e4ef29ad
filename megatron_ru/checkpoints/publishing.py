"""The last acts of a save: a manifest, the name, the tracker."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_ru.checkpoints.background import read_sums
from megatron_ru.checkpoints.checksums import FileSum, sum_files
from megatron_ru.checkpoints.layout import name_of, place_aside, write_tracker
from megatron_ru.checkpoints.manifest import MANIFEST, Manifest, write_manifest
from megatron_ru.foundation.files import fsync_folder


def begin(folder: Path, iteration: int) -> Path:
    """An empty folder to write an iteration into, under a name that nobody loads. Raises OSError."""
    place = place_aside(folder, iteration, "saving")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def sum_own_files(place: Path, rank: int, written: Iterable[str], *, threads: int) -> list[FileSum]:
    """Sums of what this rank wrote, on disk from now on: `written`, and the files that carry its number.

    The rank that wrote a file has it in memory. Raises OSError.
    """
    own = {path for path in written if (place / path).is_file()}
    own |= {path.name for path in place.glob(f"__{rank}_*")}
    known = read_sums(place, rank)
    # A file that the background process summed and synced is not read twice.
    done = [file for file in known if file.path in own]
    return done + sum_files(place, own - {file.path for file in done}, threads=threads)


def publish(folder: Path, iteration: int, sums: Iterable[FileSum], *, threads: int) -> Manifest:
    """Makes what was written the newest checkpoint; `sums` are those of all ranks, and the rest is summed here.

    In this order: contents, manifest, name, tracker, each on disk before the next. Raises OSError.
    """
    place = place_aside(folder, iteration, "saving")
    known = {file.path: file for file in sums}
    paths = [str(path.relative_to(place)) for path in sorted(place.rglob("*")) if path.is_file()]
    others = [path for path in paths if path not in known and path != MANIFEST]
    known |= {file.path: file for file in sum_files(place, others, threads=threads)}
    for inner in (path for path in place.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    manifest = write_manifest(place, iteration, known.values())
    final, replaced = folder / name_of(iteration), place_aside(folder, iteration, "replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(place, final)
    fsync_folder(folder)
    write_tracker(folder, iteration)
    shutil.rmtree(replaced, ignore_errors=True)
    return manifest


def abandon(folder: Path, iteration: int) -> None:
    """Removes what a failed save left; the checkpoints before it stay."""
    shutil.rmtree(place_aside(folder, iteration, "saving"), ignore_errors=True)
