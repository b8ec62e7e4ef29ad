"""What can be said about a checkpoint without a manifest: Megatron's own, and older ones.

`metadata.json` is the last file that megatron-core writes into a checkpoint of its distributed format, and the index
`.metadata` says where in which file each tensor lies. A tensor is an archive of `torch.save` there, as a whole file of
the older format is, and such an archive holds the CRC32 of what is in it.
"""

import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive of `torch.save`: a file, or a part of one."""

    path: str
    first: int = 0
    bytes: int | None = None
    """None for all that follows."""


def quick_problems(folder: Path) -> list[str]:
    """One sentence for each thing that is missing or too short; no tensors are read."""
    if (folder / "metadata.json").exists():
        return _distributed_problems(folder)
    ranks = _rank_files(folder)
    if ranks:
        return _rank_problems(folder, ranks)
    if (folder / ".metadata").exists():
        problems = _index_problems(folder)
        # torch_dcp has no metadata.json, and keeps Megatron's arguments as a value of their own.
        if problems or "args" in _index(folder).state_dict_metadata:
            return problems
    return [f"{folder.name} has no metadata.json, with which Megatron ends a save: it was not finished"]


def archives(folder: Path) -> list[Archive]:
    """What a checkpoint without quick problems consists of, as far as its content can be checked."""
    whole = [Archive(path=str(path.relative_to(folder))) for path in sorted(folder.rglob("*.pt"))]
    if not (folder / ".metadata").exists():
        return whole
    parts = {(part.relative_path, part.offset, part.length) for part in _index(folder).storage_data.values()}
    return whole + [Archive(path=path, first=first, bytes=length) for path, first, length in sorted(parts)]


def damaged_archives(folder: Path, share: list[Archive]) -> list[str]:
    """One sentence for each file in which an archive is not as torch wrote it."""
    damaged = {archive.path: None for archive in share if not _is_whole(folder, archive)}
    return [f"{folder.name}/{path} was changed (torch's own checksums differ)" for path in damaged]


def _distributed_problems(folder: Path) -> list[str]:
    try:
        json.loads((folder / "metadata.json").read_bytes())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{folder.name}/metadata.json is torn"]
    return _index_problems(folder)


def _index_problems(folder: Path) -> list[str]:
    try:
        index = _index(folder)
        needed: dict[str, int] = {}
        for part in index.storage_data.values():
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    # Whatever unpickling raises about a damaged file.
    except Exception as error:
        return [f"{folder.name}/.metadata cannot be read ({type(error).__name__})"]
    sentences = []
    for name, least in sorted(needed.items()):
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size is None:
            sentences.append(f"{folder.name}/{name} is missing")
        elif size < least:
            sentences.append(f"{folder.name}/{name} has {size} bytes, expected at least {least}")
    return sentences + _archive_problems(folder, sorted(folder.glob("*.pt")))


def _rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*"))


def _rank_problems(folder: Path, ranks: list[Path]) -> list[str]:
    """mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE: all combinations must be there."""
    places = [tuple(int(word) for word in re.findall(r"\d+", path.name)) for path in ranks]
    sizes = [max(numbers) + 1 for numbers in zip(*places, strict=False)]
    expected = 1
    for size in sizes:
        expected *= size
    sentences = []
    if len(places) != expected:
        sentences.append(f"{folder.name} has the files of {len(places)} ranks, expected {expected}")
    for rank in ranks:
        if not list(rank.glob("*.pt")):
            sentences.append(f"{folder.name}/{rank.name} is empty")
    return sentences + _archive_problems(folder, sorted(folder.glob("mp_rank_*/*.pt")))


def _archive_problems(folder: Path, paths: list[Path]) -> list[str]:
    # The list of contents is the last thing in an archive.
    return [f"{folder.name}/{path.relative_to(folder)} is torn" for path in paths if not zipfile.is_zipfile(path)]


def _is_whole(folder: Path, archive: Archive) -> bool:
    try:
        with (folder / archive.path).open("rb") as stream:
            stream.seek(archive.first)
            source = stream if archive.bytes is None else io.BytesIO(stream.read(archive.bytes))
            if archive.bytes is not None and source.read(2) != b"PK":
                return True  # Not an archive: nothing can be said.
            with zipfile.ZipFile(source) as opened:
                return opened.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return False


def _index(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(folder).read_metadata()
