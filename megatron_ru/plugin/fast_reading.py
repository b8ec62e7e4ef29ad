"""Megatron's distributed checkpoints, read by several threads into the place where the tensors are used.

torch reads one tensor after the other, each through Python's file object into memory, from there into another tensor,
and from there to where it is used. Here the plan stays torch's, and so does what is no plain tensor.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from megatron_ru.plugin.file_copies import FilePart, copy_parts, in_threads, read_into
from megatron_ru.plugin.tensor_archives import SavedTensor, UnknownArchive, locate
from megatron_ru.seams.seam import Seam


def fast_reading_seams(threads: int) -> list[Seam]:
    """The seam through which Megatron gets its reader."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_filesystem_reader(*arguments: Any, **keywords: Any) -> Any:
            reader = original(*arguments, **keywords)
            if isinstance(reader, FileSystemReader) and type(reader).read_data is FileSystemReader.read_data:
                reader.read_data = functools.partial(read_data, reader, threads)
            return reader

        return get_filesystem_reader

    return [
        Seam(
            target="megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader",
            make=make,
            expects=("checkpoint_dir", "cache_metadata"),
            reason="torch reads one tensor after the other, and copies it three times",
        )
    ]


def read_data(reader: FileSystemReader, threads: int, plan: LoadPlan, planner: Any) -> Future[None]:
    """What `FileSystemReader.read_data` does for this plan: every target of the planner is filled."""
    folder = Path(os.fspath(reader.path))
    straight: list[FilePart] = []
    cut: list[tuple[Path, SavedTensor, ReadItem, Tensor]] = []
    done: list[tuple[ReadItem, Tensor]] = []
    others: list[ReadItem] = []
    for path, items in _by_file(reader, plan).items():
        descriptor = os.open(folder / path, os.O_RDONLY)
        try:
            for item in items:
                stored = reader.storage_data[item.storage_index]
                try:
                    if item.type is LoadItemType.BYTE_IO or getattr(stored, "transform_descriptors", None):
                        raise UnknownArchive("it is no plain tensor")
                    saved = locate(descriptor, stored.offset, stored.length)
                except UnknownArchive:
                    others.append(item)
                    continue
                target = planner.resolve_tensor(item).detach()
                if type(target) is not Tensor or tuple(target.shape) != tuple(item.lengths):
                    others.append(item)
                    continue
                done.append((item, target))
                first = _first_number(saved, item)
                if first is None or target.dtype is not saved.dtype or not target.is_contiguous():
                    cut.append((folder / path, saved, item, target))
                else:
                    straight.append(
                        FilePart(path=folder / path, first=saved.first + first * saved.dtype.itemsize, target=target)
                    )
        finally:
            os.close(descriptor)
    copy_parts(straight, threads=threads)
    _copy_cut(cut, threads)
    for item, target in done:
        planner.commit_tensor(item, target)
    return FileSystemReader.read_data(reader, dataclasses.replace(plan, items=others), planner)


def _by_file(reader: FileSystemReader, plan: LoadPlan) -> dict[str, list[ReadItem]]:
    """The items of the plan by file, in the order in which they lie there."""
    files: dict[str, list[ReadItem]] = {}
    for item in sorted(plan.items, key=lambda item: reader.storage_data[item.storage_index].offset):
        files.setdefault(reader.storage_data[item.storage_index].relative_path, []).append(item)
    return files


def _first_number(saved: SavedTensor, item: ReadItem) -> int | None:
    """The index of the first number of what is wanted, None where that does not lie in one piece."""
    first, step, complete = 0, 1, True
    for size, offset, length in reversed(
        list(zip(saved.shape, item.storage_offsets, item.lengths, strict=True))
    ):  # fmt: skip
        if not complete and length != 1:
            return None
        complete = complete and length == size
        first += offset * step
        step *= size
    return first


def _copy_cut(cut: list[tuple[Path, SavedTensor, ReadItem, Tensor]], threads: int) -> None:
    """Tensors of which a part is wanted that does not lie in one piece, or with other types of numbers: one of them for
    each thread is in memory at a time."""
    todo: SimpleQueue[tuple[Path, SavedTensor, ReadItem, Tensor]] = SimpleQueue()
    for entry in cut:
        todo.put(entry)

    def work() -> None:
        try:
            while True:
                path, saved, item, target = todo.get_nowait()
                tensor = torch.empty(saved.shape, dtype=saved.dtype)
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    read_into(descriptor, str(path), saved.first, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
                finally:
                    os.close(descriptor)
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    tensor = tensor.narrow(dim, offset, length)
                target.copy_(tensor)
        except Empty:
            pass

    if cut:
        in_threads(work, min(threads, len(cut)))
