"""Random tokens as a dataset of Megatron's, for ours: what a GPU multiplies decides how much power it takes, and with
it how fast it runs, so nobody gets easier numbers than the others."""

from pathlib import Path

import numpy as np

from megatron_ru.benchmarks.training.task import Task
from megatron_ru.tokens.indexed_dataset import token_dtype, write_dataset


def write_random_tokens(prefix: Path, task: Task) -> None:
    """Writes a dataset with enough tokens for the steps of the task, the same for the same seed."""
    vocabulary = task.architecture().vocab_size
    length = task.sequence + 1
    documents = task.steps * task.micro_batch + 1
    ids = np.random.default_rng(task.seed).integers(vocabulary, size=documents * length)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with write_dataset(prefix, vocabulary) as writer:
        writer.add_documents(ids.astype(token_dtype(vocabulary)), np.full(documents, length, dtype=np.int32))
