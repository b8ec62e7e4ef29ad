"""How each contender is started. Nothing here needs torch."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ru.benchmarks.training.task import Task
from megatron_ru.foundation.errors import UserError

OURS = "megatron_ru"
DEFAULT_FLAGS = "--use-distributed-optimizer"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One process that trains and writes what it measured."""

    name: str
    words: tuple[str, ...]
    """Without the file to write to."""
    output_flag: str | None = None
    """Stands before the file; None where the file is the last word."""
    flags: tuple[str, ...] = ()
    """Those among the words that make it another than ours by default."""

    @property
    def ours(self) -> bool:
        """Whether it is our entry, in whatever setting."""
        return self.output_flag is not None

    def command(self, output: Path) -> list[str]:
        """All words of the process."""
        flag = [] if self.output_flag is None else [self.output_flag]
        return [*self.words, *flag, str(output)]


def our_contender(task: Task, name: str, flags: Sequence[str], dataset: Path, processes: int = 1) -> Contender:
    """Our entry on Megatron's engine, on the dataset of that prefix, with `flags` behind those of the task, so that
    they win."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    variant = task.architecture()
    words = [
        sys.executable, *(torchrun if processes > 1 else ()), "-m", "megatron_ru.pretrain_gpt",
        "--ru-variant", task.variant,
        *_flags({
            "num-layers": task.layers, "seq-length": task.sequence,
            "max-position-embeddings": variant.position_count, "micro-batch-size": task.micro_batch,
            "global-batch-size": task.micro_batch, "train-iters": task.steps, "seed": task.seed,
            "lr": task.learning_rate, "min-lr": task.learning_rate, "lr-decay-style": "constant",
            "adam-beta1": 0.9, "adam-beta2": 0.95, "weight-decay": 0.1, "clip-grad": 1.0,
            "eval-iters": 0, "log-interval": 1, "device": task.device, "tokenizer-type": "NullTokenizer",
            "data-path": dataset, "split": "100,0,0",
            "ru-profile-steps": f"{task.traced.start}:{task.traced.stop - 1}",
        }),
        "--bf16", *flags,
    ]  # fmt: skip
    return Contender(name=name, words=tuple(words), output_flag="--ru-profile", flags=tuple(flags))


def peer_contender(task: Task, name: str) -> Contender:
    """Somebody else's model in our loop for peers."""
    module = "megatron_ru.benchmarks.training.peer_process"
    return Contender(name=name, words=(sys.executable, "-m", module, name, json.dumps(task.json())))


def named_settings(texts: Sequence[str]) -> dict[str, tuple[list[str], int]]:
    """{name: (flags, processes)} of texts NAME=FLAGS or NAME@PROCESSES=FLAGS. Raises `UserError` where there is no name
    or it is there twice."""
    found: dict[str, tuple[list[str], int]] = {}
    for text in texts:
        name, equals, flags = text.partition("=")
        name = name.strip()
        if not equals or not name or name.startswith("-"):
            raise UserError(f"--also {text!r}: expected NAME=FLAGS, for example --also 'fp8=--fp8-format hybrid'")
        _, at, count = name.partition("@")
        if at and not (count.isdecimal() and int(count) > 0):
            raise UserError(f"--also {text!r}: {count!r} is no number of processes; give for example dp2@2=FLAGS")
        if name in found or name == OURS:
            raise UserError(f"--also names {name} twice: give each setting a name of its own")
        found[name] = (shlex.split(flags), int(count) if at else 1)
    return found


def _flags(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]
