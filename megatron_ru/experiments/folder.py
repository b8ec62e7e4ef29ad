"""The folder of an experiment: everything it writes is in there, and nothing of others is touched."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_ru.foundation.errors import UserError


def prepare_folder(folder: Path, marker: str, outputs: Iterable[str]) -> None:
    """Makes an empty place for a run: creates the folder, or removes the outputs of an earlier run from it.

    The file `marker` says that the folder is ours. Raises `UserError` for a folder with other things in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"{folder} is not empty and holds no earlier run ({marker}); give an empty or a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / marker).touch()
        for name in outputs:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
