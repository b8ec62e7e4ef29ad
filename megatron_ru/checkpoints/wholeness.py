"""Whether one checkpoint is whole: a look that costs nothing, and a rank's share of the reading."""

from pathlib import Path

from megatron_ru.checkpoints import unlisted
from megatron_ru.checkpoints.checksums import changed_pieces
from megatron_ru.checkpoints.manifest import DamagedManifest, read_manifest, size_problems


def quick_problems(place: Path) -> list[str]:
    """One sentence for each thing that is missing, torn or of another size; none for what may be whole."""
    if not place.is_dir():
        return [f"{place.name} is missing"]
    try:
        manifest = read_manifest(place)
    except DamagedManifest as error:
        return [str(error)]
    return unlisted.quick_problems(place) if manifest is None else size_problems(place, manifest)


def share_problems(place: Path, rank: int, ranks: int, *, threads: int) -> list[str]:
    """One sentence for each thing that was changed, in that part of the content which this rank reads.

    A checkpoint with a manifest is read piece by piece; of one without it the archives that torch wrote are read.
    """
    try:
        manifest = read_manifest(place)
        if manifest is not None:
            return changed_pieces(place, manifest.pieces[rank::ranks], manifest.piece_bytes, threads=threads)
        return unlisted.damaged_archives(place, unlisted.archives(place)[rank::ranks])
    except DamagedManifest as error:
        return [str(error)]
    except OSError as error:
        return [f"{place.name} cannot be read ({error.strerror})"]


def is_listed(place: Path) -> bool:
    """Whether there is a manifest, readable or not."""
    try:
        return read_manifest(place) is not None
    except DamagedManifest:
        return True
