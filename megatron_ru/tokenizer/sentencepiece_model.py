"""What a sentencepiece .model says of itself: pieces with scores and kinds, type, normalisation.

The fields are those of google/sentencepiece: src/sentencepiece_model.proto.
"""

import importlib
import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError


class PieceKind(IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Piece:
    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]
    """By id."""
    type_name: str
    """`unigram`, `bpe`, `word` or `char`."""
    normalization: str
    """The name of the rule; `identity` has none."""
    has_rules: bool
    """Whether characters are replaced when a text is normalised."""
    adds_prefix: bool
    """A blank is put before every text."""
    strips_blanks: bool
    """Blanks at the ends are dropped and runs of them folded."""
    suffix_blanks: bool
    """The sign for a blank ends a word instead of beginning one."""
    escapes_blanks: bool
    byte_fallback: bool
    ids: dict[str, int]
    """`unk`, `bos`, `eos`, `pad`; -1 where there is none."""

    @property
    def is_bpe(self) -> bool:
        return self.type_name == "bpe"

    @property
    def keeps_every_character(self) -> bool:
        """Nothing is normalised but the blank, which becomes its sign."""
        return not self.has_rules and not self.strips_blanks and self.escapes_blanks and not self.suffix_blanks

    @property
    def has_user_pieces(self) -> bool:
        """Pieces that are found in a text before anything else."""
        return any(piece.kind is PieceKind.USER_DEFINED for piece in self.pieces)


def read_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """The contents of the .model at `path`. Raises UserError when it is none."""
    message = parse_message(path)
    trainer, normalizer = message.trainer_spec, message.normalizer_spec
    return SentencePieceModel(
        pieces=tuple(
            Piece(text=piece.piece, score=piece.score, kind=PieceKind(piece.type)) for piece in message.pieces
        ),
        type_name=type(trainer).ModelType.Name(trainer.model_type).lower(),
        normalization=normalizer.name,
        has_rules=bool(normalizer.precompiled_charsmap),
        adds_prefix=normalizer.add_dummy_prefix,
        strips_blanks=normalizer.remove_extra_whitespaces,
        suffix_blanks=trainer.treat_whitespace_as_suffix,
        escapes_blanks=normalizer.escape_whitespaces,
        byte_fallback=trainer.byte_fallback,
        ids={
            "unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id,
        },
    )  # fmt: skip


def parse_message(path: str | os.PathLike[str]) -> Any:
    """The protobuf message of the .model at `path`. Raises UserError when it is none."""
    message = new_message()
    try:
        message.ParseFromString(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except Exception as error:  # google.protobuf.message.DecodeError
        raise UserError(f"{path} is not a sentencepiece model: {error}") from None
    if not message.pieces:
        raise UserError(f"{path} is not a sentencepiece model: it holds no pieces")
    return message


def new_message() -> Any:
    """An empty `ModelProto`."""
    # Made by protoc at its import, so that no type checker sees what is in it.
    module: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    return module.ModelProto()
