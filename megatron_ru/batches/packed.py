"""`PREFIX.packed.json`: beside a dataset whose documents are blocks of one length, what they are."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """What a run must know to read the blocks as they are."""

    block: int
    """Tokens of each block: the run's sequence length."""
    pad: int
    """The id of padding, which the tokenizer of the run must have too."""
    blocks: int
    tokens: int
    """Real ones."""
    kind: str
    """The packing."""


def packed_path(prefix: str | os.PathLike[str]) -> Path:
    """The file that says that a dataset is packed."""
    return Path(f"{os.fspath(prefix)}.packed.json")


def write_packed(prefix: str | os.PathLike[str], packed: PackedDataset) -> None:
    """Says that the dataset `prefix` is packed."""
    with atomic_output(packed_path(prefix), "w", encoding="utf-8") as stream:
        json.dump(asdict(packed), stream, indent=1, sort_keys=True)
        stream.write("\n")


def read_packed(prefix: str | os.PathLike[str]) -> PackedDataset | None:
    """What the dataset `prefix` says of its packing; None when it says nothing. Raises UserError when damaged."""
    path = packed_path(prefix)
    try:
        return PackedDataset(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not describe a packed dataset ({error}); pack again") from None
