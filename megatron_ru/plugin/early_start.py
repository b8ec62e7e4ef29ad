"""What a start can do while Python imports torch and Megatron: the words say enough for it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ru.checkpoints.early_check import EarlyCheck
from megatron_ru.foundation.words import value_of

_MOST_THREADS = 8

_early: EarlyCheck | None = None


def begin_early(words: Sequence[str], *, rank: int, ranks: int, safe: bool) -> None:
    """Begins to check the checkpoint that `--load` names, if Megatron's own trust in it is not wanted (`safe` is what
    `--ru-checkpoints` means when it is left out), and lets the system read the dataset's indexes."""
    global _early
    load, checks = value_of(words, "--load"), value_of(words, "--ru-checkpoints")
    if load and "://" not in load and (safe if checks is None else checks == "safe") and Path(load).is_dir():
        step = value_of(words, "--ckpt-step") or ""
        _early = EarlyCheck(
            Path(load), rank, ranks, threads=threads_of_a_rank(), step=int(step) if step.isdecimal() else None
        )
    for path in _indexes(words):
        _read_ahead(path)


def early_problems(place: Path, rank: int, ranks: int) -> list[str] | None:
    """What the early check found in this rank's share of `place`; None where it looked at something else."""
    return None if _early is None else _early.problems(place, rank, ranks)


def threads_of_a_rank() -> int:
    """How many threads of this rank read and sum: its share of the cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or "1")
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // ranks))


def _indexes(words: Sequence[str]) -> Iterator[Path]:
    """The indexes of the datasets that the words name, and what Megatron has computed of them."""
    for word in words:
        if not word.startswith("-") and os.path.isfile(f"{word}.idx"):
            yield Path(f"{word}.idx")
    cache = value_of(words, "--data-cache-path")
    if cache:
        yield from sorted(Path(cache).glob("*.npy"))


def _read_ahead(path: Path) -> None:
    """Tells the system that the file will be read, and waits for nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    except (OSError, AttributeError):
        return
    finally:
        os.close(descriptor)
