"""A tokenizer in the other format, written when it is equal to the first."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output
from megatron_ru.tokenizer.conversion import hugging_face_description, sentencepiece_bytes
from megatron_ru.tokenizer.equality import Comparison, compare, texts_to_compare
from megatron_ru.tokenizer.hugging_face_folder import write_folder
from megatron_ru.tokenizer.loading import HuggingFaceTokenizer, load_tokenizer
from megatron_ru.tokenizer.sentencepiece_model import PieceKind, read_model


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    texts: Iterable[str],
    *,
    accept_differences: bool = False,
) -> Comparison:
    """Writes `source` in the other format to `target` and returns what both made of `texts` and of harder ones.

    Raises UserError, and writes nothing, when the format cannot express it, or an id differs and that is not accepted.
    """
    first = load_tokenizer(source)
    to_model = str(target).endswith(".model")
    if to_model != isinstance(first, HuggingFaceTokenizer):
        kind = "a tokenizer.json" if isinstance(first, HuggingFaceTokenizer) else "a .model"
        raise UserError(f"{source} is {kind}, and so would be {target}; convert to a FILE.model or to a folder")
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / ("a.model" if to_model else "tokenizer")
        _write(first.path, trial, to_model)
        found = compare(first, load_tokenizer(trial), texts_to_compare(first, texts))
    if found.differing and not accept_differences:
        raise UserError(
            f"{source} in the other format gives other ids on {found.differing} of {found.texts} texts; the first: "
            f"{found.example}; nothing was written: use it as it is, or pass --accept-differences"
        )
    try:
        _write(first.path, Path(target), to_model)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    return found


def _write(source: str, target: Path, to_model: bool) -> None:
    if to_model:
        tokenizer = HuggingFaceTokenizer(source)
        with atomic_output(target) as stream:
            stream.write(sentencepiece_bytes(tokenizer.description, tokenizer.roles))
        return
    model = read_model(source)
    texts = [piece.text for piece in model.pieces]
    roles = {f"{role}_token": texts[number] for role, number in model.ids.items() if 0 <= number < len(texts)}
    control = [piece.text for piece in model.pieces if piece.kind is PieceKind.CONTROL]
    further = [text for text in control if text not in roles.values()]
    folder = target.parent if target.name == "tokenizer.json" else target
    write_folder(folder, hugging_face_description(source), roles, further)
