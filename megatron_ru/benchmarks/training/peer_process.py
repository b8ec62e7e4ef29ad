"""`python -m megatron_ru.benchmarks.training.peer_process PEER TASK OUTPUT`: one peer trains alone in its process."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_ru.benchmarks.training.loop import train
from megatron_ru.benchmarks.training.peer import TRAINING_PEERS
from megatron_ru.benchmarks.training.task import Task
from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.step_measurement import write_document

# What a process writes in the place of a measurement when the peer cannot run here.
SKIPPED = "skipped"


def main(words: list[str]) -> int:
    """Writes the document of the measurement, or `{"skipped": reason}`, and returns 0."""
    name, task_words, output = words
    peer, task = TRAINING_PEERS[name], Task(**json.loads(task_words))
    reason = peer.missing(task.device)
    if reason:
        write_document(output, {SKIPPED: reason})
        return 0
    torch.manual_seed(task.seed)
    if task.device == "cuda":
        torch.cuda.set_device(0)
    if peer.build is not None:
        built = peer.build(task.architecture(), task.shape(), task.device)
        document = train(built, task, task.shape())
        document["parameters"] = sum(parameter.numel() for parameter in built.model.parameters())
    else:
        assert peer.measure is not None
        document = peer.measure(task, task.shape())
    document["versions"] = {one: _version(one) for one in ("torch", *peer.distributions)}
    write_document(output, document)
    return 0


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"megatron-ru: error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
