"""Saves that survive a kill and a full disk.

Megatron writes into the folder that later has the checkpoint's name, overwrites the tracker in place, syncs some of
the files, and ends the run when a write fails; where one rank alone fails, the others wait for it. Here it writes into
`.iter_N.saving` and its tracker goes nowhere. When all ranks are done, they sum and sync what they wrote, and rank 0
publishes. A failed write is noted until then, so that all ranks learn of it together.
"""

import argparse
import functools
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from megatron_ru.checkpoints.background import write_and_sum
from megatron_ru.checkpoints.checksums import FileSum
from megatron_ru.checkpoints.layout import TRACKER, name_of, read_tracker
from megatron_ru.checkpoints.publishing import abandon, begin, publish, sum_own_files
from megatron_ru.checkpoints.retention import put_outdated_aside, remove_aside
from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.ranks_together import RanksTogether
from megatron_ru.seams.seam import Seam

_CHECKPOINTING = "megatron.training.checkpointing"


@dataclass(kw_only=True)
class Save:
    """One save under way."""

    folder: Path
    iteration: int
    place: Path
    last: bool
    """Whether no other save follows."""
    error: str | None = None
    """Why it fails, as far as this rank knows."""
    written: set[str] = field(default_factory=set)
    """What this rank wrote by itself, relative to `place`."""
    wandb: tuple[Any, ...] | None = None

    def note(self, error: BaseException) -> None:
        """The first error counts."""
        self.error = self.error or _sentence(error)


class SafeSaving:
    """The saves of one run. `report` gets a line for the metrics file when one fails."""

    def __init__(self, args: argparse.Namespace, threads: int, report: Callable[[dict[str, Any]], None]):
        self._args = args
        self._threads = threads
        self._report = report
        self._under_way: list[Save] = []
        self._wandb: Callable[..., Any] | None = None

    def seams(self) -> list[Seam]:
        """The seams of one run."""
        where = "Megatron chooses the name of the folder and the place of the tracker by itself"
        alone = "where this fails on one rank, the others wait for it"
        writer = "strategies.filesystem_async:FileSystemWriterAsync.finish"
        core = "megatron.core.dist_checkpointing"
        nvrx = "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async:FileSystemWriterAsync.finish"
        asynchronous = [Seam(target=nvrx, make=self._noting, reason=alone, optional=True)]
        return (asynchronous if self._args.async_save else []) + [
            Seam(target="megatron.training.training:save_checkpoint", make=self._around_save,
                 expects=("iteration",), reason="Megatron ends the run when a save fails"),
            Seam(target="megatron.training.training:maybe_finalize_async_save", make=self._around_finalize,
                 reason="Megatron ends the run when an asynchronous save fails"),
            Seam(target=f"{_CHECKPOINTING}:schedule_async_save", make=self._around_schedule,
                 expects=("async_request",), reason="what follows an asynchronous save is closed to others"),
            Seam(target=f"{_CHECKPOINTING}:get_checkpoint_name", make=self._naming,
                 expects=("checkpoints_path", "iteration"), reason=where),
            Seam(target=f"{_CHECKPOINTING}:get_checkpoint_tracker_filename", make=self._tracking,
                 expects=("checkpoints_path",), reason=where),
            Seam(target="megatron.training.wandb_utils:on_save_checkpoint_success", make=self._delaying,
                 reason="it is told of a checkpoint before that has its name", optional=True),
            Seam(target=f"{core}.serialization:save_config", make=self._noting, reason=alone),
            Seam(target=f"{core}.{writer}", make=self._noting,
                 reason=alone),
            Seam(target=f"{_CHECKPOINTING}:ensure_directory_exists", make=self._noting, reason=alone),
            Seam(target=f"{_CHECKPOINTING}:save_tokenizer_assets", make=self._noting, reason=alone, optional=True),
            Seam(target="torch:save", make=self._torch_save, reason=alone),
        ]  # fmt: skip

    def _around_save(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save_checkpoint(iteration: int, *rest: Any, **keywords: Any) -> Any:
            if not self._is_ours(keywords):
                return original(iteration, *rest, **keywords)
            save = self._begin(iteration)
            if save.error is not None:
                return self._failed(save)
            self._under_way.append(save)
            follows = self._args.async_save
            try:
                original(iteration, *rest, **keywords)
            except CheckpointException as error:
                # All ranks raise it together.
                save.note(error)
                follows = False
            if not follows:
                self._finish(save)
            return None

        return save_checkpoint

    def _around_schedule(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def schedule(async_request: Any) -> Any:
            save = self._under_way[-1] if self._under_way else None
            if save is not None:
                if async_request.async_fn is not None:
                    write = functools.partial(
                        write_and_sum, async_request.async_fn, str(save.place), RanksTogether().rank
                    )
                    async_request = async_request._replace(async_fn=write)
                async_request.add_finalize_fn(lambda: self._finish(save))
            return original(async_request)

        return schedule

    def _around_finalize(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def maybe_finalize_async_save(*arguments: Any, **keywords: Any) -> Any:
            while True:
                try:
                    return original(*arguments, **keywords)
                except CheckpointException as error:
                    # All ranks raise it together, and it is about the oldest one. The others are still to be done.
                    if not self._under_way:
                        raise
                    save = self._under_way[0]
                    save.note(error)
                    self._finish(save)

        return maybe_finalize_async_save

    def _is_ours(self, keywords: dict[str, Any]) -> bool:
        args = self._args
        other = getattr(args, "logits_save_dir", None) or getattr(args, "freeze_all_layers", False)
        return not (keywords.get("non_persistent_ckpt") or keywords.get("release") or other)

    def _begin(self, iteration: int) -> Save:
        # Read now: Megatron converts formats by saving elsewhere.
        folder = Path(self._args.save)
        last = iteration >= (self._args.train_iters or 0)
        ranks, error, place = RanksTogether(), None, folder
        if ranks.rank == 0:
            try:
                place = begin(folder, iteration)
            except OSError as problem:
                error = _sentence(problem)
        place, error = ranks.first((place, error))
        return Save(folder=folder, iteration=iteration, place=place, last=last, error=error)

    def _finish(self, save: Save) -> None:
        """Publishes or abandons; all ranks call this together and come to the same end."""
        self._under_way = [other for other in self._under_way if other is not save]
        ranks = RanksTogether()
        sums: list[FileSum] = []
        if save.error is None:
            try:
                sums = sum_own_files(save.place, ranks.rank, save.written, threads=self._threads)
            except OSError as error:
                save.note(error)
        told = ranks.all((save.error, sums))
        save.error = next((error for error, _ in told if error is not None), None)
        if ranks.rank == 0 and save.error is None:
            try:
                every = (file for _, share in told for file in share)
                publish(save.folder, save.iteration, every, threads=self._threads)
            except OSError as error:
                save.note(error)
        save.error = ranks.first(save.error)
        if save.error is not None:
            return self._failed(save)
        if save.wandb is not None and self._wandb is not None:
            self._wandb(str(save.folder / name_of(save.iteration)), str(save.folder / TRACKER), *save.wandb)
        if ranks.rank == 0 and self._args.ru_keep is not None:
            self._retain(save)
        return None

    def _failed(self, save: Save) -> None:
        ranks = RanksTogether()
        sentence = f"step {save.iteration} could not be saved in {save.folder}: {save.error}"
        newest = ranks.first(read_tracker(save.folder).text)
        kept = f"step {newest} is the newest checkpoint" if newest else "there is no checkpoint yet"
        if ranks.rank == 0:
            # Before what was written is removed: this is what the save ran into.
            sentence += _space_left(save.folder)
            abandon(save.folder, save.iteration)
        sentence = ranks.first(sentence)
        self._report({"iteration": save.iteration, "save_error": save.error})
        if save.last:
            raise UserError(f"{sentence}; {kept}; make room there and start the same command again")
        if ranks.rank == 0:
            print(f"megatron_ru: ERROR: {sentence}; {kept}; training goes on, and the next save is tried as usual",
                  file=sys.stderr, flush=True)  # fmt: skip

    def _retain(self, save: Save) -> None:
        try:
            gone = put_outdated_aside(save.folder, save.iteration, self._args.ru_keep, self._args.ru_keep_every)
        except OSError as error:
            print(f"megatron_ru: old checkpoints stay in {save.folder}: {error}", file=sys.stderr, flush=True)
            return
        if gone:
            names = ", ".join(map(str, gone))
            print(f"megatron_ru: removing the checkpoints of step {names} (--ru-keep)", flush=True)
            # Many gigabytes take their time to go; the end of the process waits for them.
            threading.Thread(target=remove_aside, args=(save.folder,), name="ru-remove").start()

    def _naming(self, original: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(original)
        def get_checkpoint_name(checkpoints_path: str, iteration: int, *rest: Any, **keywords: Any) -> str:
            name = original(checkpoints_path, iteration, *rest, **keywords)
            save = self._of_folder(checkpoints_path, iteration)
            if save is None:
                return name
            return name.replace(os.path.join(checkpoints_path, name_of(iteration)), str(save.place), 1)

        return get_checkpoint_name

    def _tracking(self, original: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(original)
        def get_checkpoint_tracker_filename(checkpoints_path: str) -> str:
            return original(checkpoints_path) if self._of_folder(checkpoints_path) is None else os.devnull

        return get_checkpoint_tracker_filename

    def _of_folder(self, folder: str | None, iteration: int | None = None) -> Save | None:
        found = (
            save
            for save in self._under_way
            if folder is not None and Path(folder) == save.folder and iteration in (None, save.iteration)
        )
        return next(found, None)

    def _delaying(self, original: Callable[..., Any]) -> Callable[..., Any]:
        self._wandb = original

        @functools.wraps(original)
        def on_save_checkpoint_success(path: str, tracker: str, save_dir: str, iteration: int) -> Any:
            save = self._of_folder(save_dir, iteration)
            if save is None:
                return original(path, tracker, save_dir, iteration)
            save.wandb = (save_dir, iteration)
            return None

        return on_save_checkpoint_success

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What this rank does alone: it goes on as if it had succeeded, and tells when all are asked."""

        @functools.wraps(original)
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                return original(*arguments, **keywords)
            except OSError as error:
                if not self._under_way:
                    raise
                self._under_way[0 if self._args.async_save else -1].note(error)
                return None

        return call

    def _torch_save(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save(obj: Any, f: Any, *rest: Any, **keywords: Any) -> Any:
            ours = next((one for one in self._under_way if _is_inside(f, one.place)), None)
            if ours is None:
                return original(obj, f, *rest, **keywords)
            try:
                original(obj, f, *rest, **keywords)
                ours.written.add(os.path.relpath(f, ours.place))
            # torch's writer raises RuntimeError when the disk is full.
            except (OSError, RuntimeError) as error:
                ours.note(error)
            return None

        return save


def _space_left(folder: Path) -> str:
    try:
        found = os.statvfs(folder)
    except OSError:
        return ""
    return f" ({found.f_bavail * found.f_frsize / 1e6:.1f} MB free)"


def _is_inside(path: Any, place: Path) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(place)


def _sentence(error: BaseException) -> str:
    """The error in one line; of many ranks' errors, the first one."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {_sentence(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return " ".join(str(error).split())[:300] or type(error).__name__
