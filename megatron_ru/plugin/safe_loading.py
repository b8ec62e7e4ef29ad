"""Loading of what is whole: before Megatron loads, all ranks agree which checkpoint that is.

Megatron takes the tracker at its word: a torn tracker ends the run with code 0, a missing one starts a new run, and a
checkpoint that is damaged ends in a traceback, or trains on without a word when a number was changed.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ru.checkpoints.layout import TRACKER, iterations, read_tracker
from megatron_ru.checkpoints.ranks import Alone, Ranks
from megatron_ru.checkpoints.retention import bring_back, sweep
from megatron_ru.checkpoints.selection import Selection, select
from megatron_ru.checkpoints.wholeness import share_problems
from megatron_ru.plugin.early_start import early_problems
from megatron_ru.plugin.fast_reading import fast_reading_seams
from megatron_ru.plugin.needless_copies import NeedlessCopies
from megatron_ru.plugin.ranks_together import RanksTogether, ranks_have_met
from megatron_ru.plugin.warm_up import warm_up_seams
from megatron_ru.seams.seam import Seam


class SafeLoading:
    """What one run loads."""

    def __init__(self, args: argparse.Namespace, threads: int):
        self._args = args
        self._threads = threads
        self._selected: dict[Path, Selection] = {}

    def seams(self) -> list[Seam]:
        """The seams of one run."""
        reason = "Megatron takes the tracker at its word"
        return [
            *fast_reading_seams(self._threads),
            *warm_up_seams(),
            Seam(target="megatron.training.training:load_checkpoint", make=self._around_load, reason=reason),
            Seam(target="megatron.training.checkpointing:read_metadata", make=self._reading,
                 expects=("tracker_filename",), reason=reason),
        ]  # fmt: skip

    def _around_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_checkpoint(*arguments: Any, **keywords: Any) -> Any:
            load_arg = keywords.get("load_arg", arguments[3] if len(arguments) > 3 else "load")
            folder = self._folder(getattr(self._args, load_arg))
            if folder is None:
                return original(*arguments, **keywords)
            ranks = RanksTogether()
            selection = self._select(folder, ranks)
            if ranks.rank == 0:
                self._tell(folder, selection)
            if selection.iteration is None:
                return original(*arguments, **keywords)
            self._selected[folder] = selection
            return self._with_step(selection, lambda: original(*arguments, **keywords))

        return load_checkpoint

    def _folder(self, load: str | None) -> Path | None:
        """The folder that Megatron will load from; None where there is nothing that could be checked."""
        for name in (load, getattr(self._args, "pretrained_checkpoint", None)):
            if name is not None and "://" not in name:
                folder = Path(name)
                if read_tracker(folder).text is not None or iterations(folder):
                    return folder
        return None

    def _select(self, folder: Path, ranks: Ranks) -> Selection:
        if ranks.rank == 0:
            # The folder of another run may be read-only, and is not ours to repair.
            with suppress(OSError):
                bring_back(folder)

        def check_share(place: Path) -> list[str]:
            known = early_problems(place, ranks.rank, ranks.size)
            if known is not None:
                return known
            return share_problems(place, ranks.rank, ranks.size, threads=self._threads)

        return select(folder, ranks, check_share, step=getattr(self._args, "ckpt_step", None) or None)

    def _tell(self, folder: Path, selection: Selection) -> None:
        for sentence in selection.problems:
            print(f"megatron_ru: WARNING: {folder}: {sentence}", file=sys.stderr, flush=True)
        if selection.iteration is None:
            if selection.problems:
                print(f"megatron_ru: nothing whole in {folder}, and nothing was finished there: starting from the "
                      "beginning", file=sys.stderr, flush=True)  # fmt: skip
            return
        if not selection.named and not selection.release:
            print(f"megatron_ru: loading step {selection.iteration} from {folder}, the newest whole checkpoint; "
                  f"{TRACKER} names {read_tracker(folder).text or 'none'}", file=sys.stderr, flush=True)  # fmt: skip
        if self._args.save and Path(self._args.save) == folder and not selection.release:
            try:
                for sentence in sweep(folder, selection.iteration):
                    print(f"megatron_ru: {folder}: {sentence}", flush=True)
            except OSError as error:
                print(f"megatron_ru: leftovers stay in {folder}: {error}", file=sys.stderr, flush=True)

    def _with_step(self, selection: Selection, load: Callable[[], Any]) -> Any:
        """Loads with the iteration said in Megatron's own way, for a folder without a tracker."""
        args = self._args
        before = getattr(args, "ckpt_step", None), getattr(args, "pretrained_checkpoint", None)
        if not selection.release:
            args.ckpt_step = selection.iteration
        if before[1] is not None and args.load is not None and Path(args.load) in self._selected:
            # Without a tracker there, Megatron would prefer these weights to the checkpoint.
            args.pretrained_checkpoint = None
        try:
            with NeedlessCopies():
                return load()
        finally:
            args.ckpt_step, args.pretrained_checkpoint = before

    def _reading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def read_metadata(tracker_filename: str) -> Any:
            folder = Path(tracker_filename).parent
            selection = self._selected.get(folder)
            if selection is None and not ranks_have_met() and "://" not in tracker_filename:
                # For --use-checkpoint-args, before there are ranks to agree with: by names and sizes.
                selection = select(folder, Alone(), lambda place: [])
            if selection is None or selection.iteration is None:
                return original(tracker_filename)
            return selection.iteration, selection.release

        return read_metadata
