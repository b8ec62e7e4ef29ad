"""The hosts of an attempt, where there are more than it needs."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output
from megatron_ru.launch.guard.retries import short


class Hosts:
    """Takes hosts out of a hostfile, or tells srun which ones to leave out. Raises UserError where neither fits."""

    def __init__(self, words: Sequence[str], spares: int, hostfile: str | None):
        self.spares = spares
        self._words, self._hostfile = list(words), hostfile
        self._lines: list[str] = []
        if not spares:
            return
        if hostfile is not None:
            self._lines = [line for line in Path(hostfile).read_text(encoding="utf-8").splitlines() if line.strip()]
            if len(self._lines) <= spares:
                raise UserError(
                    f"{hostfile} lists {len(self._lines)} hosts, of which {spares} are spare: list more of them, or "
                    "give a smaller --spares"
                )
        elif Path(words[0]).name != "srun":
            raise UserError(f"hosts cannot be left out of {words[0]}: give its --hostfile, or leave --spares out")

    def words_without(self, left_out: Sequence[str]) -> list[str]:
        """The words of the launcher for an attempt without these hosts; the hostfile is written anew."""
        if self._hostfile is None:
            without = [f"--exclude={','.join(left_out)}"] if self.spares and left_out else []
            return [self._words[0], *without, *self._words[1:]]
        if self.spares:
            good = [line for line in self._lines if short(line.split()[0]) not in left_out]
            with atomic_output(self._hostfile, "w", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in good[: len(self._lines) - self.spares])
        return self._words
