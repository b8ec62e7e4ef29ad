"""The manifest of a checkpoint: every file with its size and its checksums. Where it is, the checkpoint was whole."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ru.checkpoints.checksums import PIECE_BYTES, FileSum, piece_count
from megatron_ru.foundation.files import atomic_output

MANIFEST = "ru_manifest.json"
_FORMAT = 1


class DamagedManifest(ValueError):
    """A manifest that is there and cannot be believed."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    iteration: int
    piece_bytes: int
    files: tuple[FileSum, ...]

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def pieces(self) -> list[tuple[FileSum, int]]:
        """Every piece of every file."""
        return [(file, index) for file in self.files for index in range(len(file.crc32))]


def write_manifest(folder: Path, iteration: int, files: Iterable[FileSum]) -> Manifest:
    """The manifest of these files, which `folder` holds from now on."""
    ordered = tuple(sorted(files, key=lambda file: file.path))
    manifest = Manifest(iteration=iteration, piece_bytes=PIECE_BYTES, files=ordered)
    content = {"format": _FORMAT, **asdict(manifest)}
    with atomic_output(folder / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump({**content, "crc32": _own_sum(content)}, stream)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, None where it has none. Raises `DamagedManifest`."""
    place = f"{folder.name}/{MANIFEST}"
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        expected = content.pop("crc32")
        if content["format"] > _FORMAT:
            raise DamagedManifest(f"{place} is of format {content['format']}, this version reads {_FORMAT}")
        if expected != _own_sum(content):
            raise DamagedManifest(f"{place} was changed (its own CRC32 is another)")
        files = tuple(FileSum(**{**file, "crc32": tuple(file["crc32"])}) for file in content["files"])
        manifest = Manifest(iteration=content["iteration"], piece_bytes=content["piece_bytes"], files=files)
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise DamagedManifest(f"{place} is no manifest any more") from None
    except OSError as error:
        raise DamagedManifest(f"{place} cannot be read ({error.strerror})") from None
    return manifest


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """One sentence for each file that is missing or has another size; reads no content."""
    sentences = []
    for file in manifest.files:
        place = f"{folder.name}/{file.path}"
        try:
            size = (folder / file.path).stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            sentences.append(f"{place} is missing" if missing else f"{place} cannot be read ({error.strerror})")
            continue
        if size != file.bytes:
            sentences.append(f"{place} has {size} bytes, expected {file.bytes}")
        elif len(file.crc32) != piece_count(size, manifest.piece_bytes):
            sentences.append(f"{place} has {len(file.crc32)} checksums in the manifest, too few for {size} bytes")
    return sentences


def _own_sum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
