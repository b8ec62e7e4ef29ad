"""A rank's share of a checkpoint, summed by a process of its own while the rank imports torch and builds its model.

    python -m megatron_ru.checkpoints.early_check FOLDER RANK RANKS THREADS [STEP]

prints one line of JSON: the name of the checkpoint that will be loaded if it is whole, and what is wrong with this
rank's share of it. A thread of the rank itself would wait for Python's lock at every block. What was read lies in the
page cache when it is loaded.
"""

import atexit
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from megatron_ru.checkpoints.ranks import Alone
from megatron_ru.checkpoints.selection import select
from megatron_ru.checkpoints.wholeness import is_listed, share_problems
from megatron_ru.foundation.errors import UserError


class EarlyCheck:
    """The check of one rank, under way."""

    def __init__(self, folder: Path, rank: int, ranks: int, *, threads: int, step: int | None = None):
        self.folder = folder
        self._share = (rank, ranks)
        numbers = [rank, ranks, threads, *([] if step is None else [step])]
        words = [sys.executable, "-m", __name__, str(folder), *map(str, numbers)]
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._process: subprocess.Popen[bytes] | None = None
        # Without it the rank checks by itself.
        with suppress(OSError):
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
            atexit.register(self.stop)
        self._found: dict[str, list[str]] = {}

    def problems(self, place: Path, rank: int, ranks: int) -> list[str] | None:
        """One sentence for each thing that is wrong with this share of `place`, once they are known; None where
        something else was checked. One answer is for one load: later the files may be others."""
        if self._process is not None:
            said, _ = self._process.communicate()
            with suppress(ValueError, KeyError, TypeError):
                answer = json.loads(said)
                self._found[answer["name"]] = answer["problems"]
            self._process = None
        if place.parent != self.folder or (rank, ranks) != self._share:
            return None
        return self._found.pop(place.name, None)

    def stop(self) -> None:
        """Ends the process, if it is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main(words: list[str]) -> int:
    """Checks, prints, and returns 0."""
    folder = Path(words[0])
    rank, ranks, threads, *step = map(int, words[1:])
    try:
        selection = select(folder, Alone(), lambda place: [], step=step[0] if step else None)
    except UserError:
        return 0  # The rank will say it, by the same look.
    place = folder / selection.name
    # Torch's own checksums need torch, which this process has not.
    if selection.iteration is not None and is_listed(place):
        print(json.dumps({"name": place.name, "problems": share_problems(place, rank, ranks, threads=threads)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
