"""Which checkpoints go, and how they go: under another name first, so that what has its name is never half deleted."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_ru.checkpoints.layout import Aside, asides, iterations, name_of, place_aside
from megatron_ru.checkpoints.selection import whole_iterations
from megatron_ru.checkpoints.wholeness import is_listed, quick_problems


def outdated(present: Sequence[int], whole: Sequence[int], newest: int, keep: int, keep_every: int | None) -> list[int]:
    """Those of the iterations `present` that need not stay, once `newest` is saved.

    The newest `keep` of the `whole` ones stay, every multiple of `keep_every`, and what is newer than `newest`: a run
    that went back leaves it to the user.
    """
    kept = set(sorted(number for number in whole if number <= newest)[-max(keep, 1) :]) | {newest}
    oldest_kept = min(kept)
    return [number for number in present if number < oldest_kept and not (keep_every and number % keep_every == 0)]


def put_outdated_aside(folder: Path, newest: int, keep: int, keep_every: int | None) -> list[int]:
    """The iterations that have no name any more; `remove_aside` deletes them. Links stay: what they lead to is
    somebody else's."""
    gone = []
    for number in outdated(iterations(folder), whole_iterations(folder), newest, keep, keep_every):
        place = folder / name_of(number)
        if place.is_symlink():
            continue
        target = place_aside(folder, number, "removed")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(place, target)
        gone.append(number)
    return gone


def remove_aside(folder: Path) -> None:
    """Deletes what is on its way out."""
    for left in asides(folder):
        if left.kind == "removed":
            shutil.rmtree(left.path, ignore_errors=True)


def bring_back(folder: Path) -> list[int]:
    """The iterations that were about to be replaced when the run was killed, and have their name again."""
    back = []
    for left in asides(folder):
        if left.kind == "replaced" and not (folder / name_of(left.iteration)).exists():
            os.rename(left.path, folder / name_of(left.iteration))
            back.append(left.iteration)
    return back


def sweep(folder: Path, loaded: int) -> list[str]:
    """Deletes what killed saves left, now that iteration `loaded` is known to be whole; one sentence for each.

    That is: what still has the name of an unfinished save, and what Megatron itself left unfinished before `loaded`.
    A finished checkpoint that was damaged later is the user's to look at.
    """
    sentences = []
    for left in asides(folder):
        shutil.rmtree(left.path, ignore_errors=True)
        sentences += [f"removed {left.path.name}, {_what(left)}"]
    for number in iterations(folder):
        place = folder / name_of(number)
        if number >= loaded or place.is_symlink() or is_listed(place) or (place / "metadata.json").exists():
            continue
        if quick_problems(place):
            target = place_aside(folder, number, "removed")
            os.rename(place, target)
            shutil.rmtree(target, ignore_errors=True)
            sentences.append(f"removed {place.name}, which a killed save left unfinished")
    return sentences


def _what(left: Aside) -> str:
    return {
        "saving": "which a killed save left unfinished",
        "removed": "whose deletion was cut short",
        "replaced": "which a newer save of the same step replaced",
    }[left.kind]
