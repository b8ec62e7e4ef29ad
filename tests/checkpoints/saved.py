"""Folders of checkpoints as a run leaves them, without a run."""

import random

from megatron_ru.checkpoints.checksums import PIECE_BYTES
from megatron_ru.checkpoints.publishing import begin, publish

FILES = {"__0_0.distcp": 5000, "__1_0.distcp": 70_001, ".metadata": 900, "metadata.json": 63, "data/part.pt": 1}


def save(folder, *iterations, files=FILES):
    """Publishes checkpoints of random bytes, each with other ones."""
    for iteration in iterations:
        place = begin(folder, iteration)
        for name, size in files.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(random.Random(f"{iteration}{name}").randbytes(size))
        publish(folder, iteration, [], threads=2)
    assert max(files.values()) < PIECE_BYTES


def flip(path, bit):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def content(folder):
    """Every file below with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
