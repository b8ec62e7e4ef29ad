"""The tiny model of these tests: eight steps of two ranks, TP 2."""

import subprocess
from pathlib import Path

from tests.training_runs import Run, Trainer

STEPS = 8


class TinyModel:
    """Its command lines, and what its runs leave behind."""

    def __init__(self, trainer: Trainer):
        self.folder = trainer.folder
        self._trainer = trainer
        self.undisturbed = Run(0, "", Path())
        """The run that others have to reproduce."""

    def command(self, name: str, *extra: str | Path, layout: tuple[str, ...] = ("--tensor-model-parallel-size", "2"),
                steps: int = STEPS) -> list[str]:  # fmt: skip
        """The words that train; the losses go to `name`."""
        words = self._trainer.words("--ru-variant", "llama2_tiny", *layout, *map(str, extra), name=name, steps=steps)
        return ["megatron-ru", "pretrain_gpt", *words]

    def metrics(self, name: str) -> Path:
        """The file that gets a line for each step."""
        return self.folder / f"{name}.jsonl"

    def run(self, name: str, ran: subprocess.CompletedProcess[str], steps: int = STEPS) -> Run:
        """What the run `name` has left behind; fails unless it went well and did every step."""
        run = Run(ran.returncode, ran.stdout, self.metrics(name))
        assert ran.returncode == 0, ran.stdout[-4000:]
        assert list(run.losses) == list(range(1, steps + 1)), ran.stdout[-4000:]
        return run
