"""Which checkpoint of a folder is loaded: the one that the tracker names, or the newest that is whole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ru.checkpoints.layout import TRACKER, iterations, name_of, read_tracker
from megatron_ru.checkpoints.manifest import MANIFEST
from megatron_ru.checkpoints.ranks import Ranks
from megatron_ru.checkpoints.wholeness import is_listed, quick_problems
from megatron_ru.foundation.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to load."""

    iteration: int | None
    """None: nothing, the run starts from the beginning."""
    release: bool = False
    problems: tuple[str, ...] = ()
    """One sentence for each thing that is wrong with what was passed over."""
    named: bool = True
    """Whether it is what the tracker, or the user, named."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "release" if self.release else name_of(self.iteration or 0)


def select(
    folder: Path, ranks: Ranks, check_share: Callable[[Path], list[str]], *, step: int | None = None
) -> Selection:
    """The checkpoint to load, the same on all ranks: `step` and nothing else if given, or else the newest whole one.

    Rank 0 looks at names and sizes, then each rank reads its share: `check_share(place)` gives one sentence for each
    thing that is wrong there. Raises `UserError` on every rank when `step` is not whole, or when nothing is although
    the tracker names something.
    """
    tracker = read_tracker(folder)
    wanted = _candidates(folder, step) if ranks.rank == 0 else iter(())
    problems: list[str] = []
    while True:
        name = ranks.first(_next_without_quick_problems(folder, wanted, problems))
        if name is None:
            break
        found = [sentence for share in ranks.all(check_share(folder / name)) for sentence in share]
        if not found:
            # What another rank passed over is rank 0's to tell.
            return ranks.first(_selection(name, tuple(problems), tracker.text, step))
        problems += found
    ranks.first(None)
    text = ranks.first(_refusal(folder, tracker.text, step, problems))
    if text is not None:
        raise UserError(text)
    return ranks.first(Selection(iteration=None, problems=tuple(problems)))


def whole_iterations(folder: Path) -> list[int]:
    """The iterations here with nothing missing, by names and sizes, in ascending order."""
    return [iteration for iteration in iterations(folder) if not quick_problems(folder / name_of(iteration))]


def _candidates(folder: Path, step: int | None) -> Iterator[str]:
    """Names of folders in the order of preference."""
    tracker = read_tracker(folder)
    if step is not None:
        yield name_of(step)
    elif tracker.release:
        yield "release"
    else:
        named = tracker.iteration
        newest_first = iterations(folder)[::-1]
        if named is None:
            yield from map(name_of, newest_first)
            return
        # A kill between the last two acts of a save leaves a whole checkpoint that is younger than the tracker. One
        # that is older than the tracker, and has a higher number, was left behind on purpose.
        cut_off = [number for number in newest_first if number > named and _is_younger_than_tracker(folder, number)]
        older = [number for number in newest_first if number < named]
        others = [number for number in newest_first if number > named and number not in cut_off]
        yield from map(name_of, [*cut_off, named, *older, *others])


def _is_younger_than_tracker(folder: Path, iteration: int) -> bool:
    place = folder / name_of(iteration)
    if not is_listed(place):
        return False
    return (place / MANIFEST).stat().st_mtime_ns > (folder / TRACKER).stat().st_mtime_ns


def _next_without_quick_problems(folder: Path, wanted: Iterator[str], problems: list[str]) -> str | None:
    for name in wanted:
        found = quick_problems(folder / name)
        if not found:
            return name
        problems += found
    return None


def _selection(name: str, problems: tuple[str, ...], tracker: str | None, step: int | None) -> Selection:
    if name == "release":
        return Selection(iteration=0, release=True, problems=problems)
    iteration = int(name.removeprefix("iter_"))
    return Selection(iteration=iteration, problems=problems, named=tracker == str(iteration) or step == iteration)


def _refusal(folder: Path, tracker: str | None, step: int | None, problems: list[str]) -> str | None:
    """Why the run must not start, None when it may start from the beginning."""
    found = "; ".join(problems)
    if step is not None:
        return f"--ckpt-step {step} is not whole in {folder}: {found}; choose another step, or drop the flag"
    if tracker is None:
        return None
    named = repr(tracker) if tracker else "nothing"
    return (
        f"{folder} has no whole checkpoint, but its {TRACKER} names {named}, so this is no new run: "
        f"{found or 'there is no folder of an iteration'}; bring one back, or remove {TRACKER} to start from the "
        "beginning"
    )
