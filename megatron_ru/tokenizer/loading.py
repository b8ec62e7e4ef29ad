"""One small interface over the tokenizer formats: sentencepiece `.model` and Hugging Face `tokenizer.json`.

Text is data here. A literal `</s>` in a document is encoded as the characters it is made of and never becomes
the control token, whichever format the tokenizer has.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ru.foundation.errors import UserError


class Tokenizer(Protocol):
    """Text to token ids and back. Ids lie in [0, vocab_size)."""

    path: str
    """The file it was loaded from."""

    vocab_size: int
    """One more than the highest id."""

    eod: int | None
    """The id that ends a document (the tokenizer's end-of-sequence token), None when it has none."""

    pad: int | None
    """The id of padding, None when the tokenizer has none."""

    unk: int | None
    """The id that stands for what has no piece, None when the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added before or behind, no control token is recognised in it."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on one thread."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens give nothing."""

    def pieces(self) -> list[str]:
        """The vocabulary by id, as the format spells it; an id that is not in use is the empty string."""

    def text_pieces(self) -> list[str]:
        """The pieces that text is made of: neither control tokens nor the tokens of single bytes."""

    def control_pieces(self) -> list[str]:
        """The control tokens as they are spelled, by id."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `path`: a `.model`, a `tokenizer.json`, or a folder that holds one of them.

    Raises UserError when there is none or it cannot be read.
    """
    file = _tokenizer_file(Path(path))
    return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


class SentencePieceTokenizer:
    """A sentencepiece model.

    Its control pieces are never found in text (google/sentencepiece: doc/special_symbols.md).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import sentencepiece

        self.path = str(path)
        try:
            # An empty file is a valid message of no fields, which sentencepiece takes without a word.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes() or b"-")
        except (RuntimeError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its contents do not parse"
            raise UserError(
                f"{path} is not a sentencepiece model ({reason}); give the .model that "
                "`megatron-ru tokenizer train` wrote, or a Hugging Face tokenizer.json"
            ) from None
        self.vocab_size: int = self._processor.get_piece_size()
        eos: int = self._processor.eos_id()
        self.eod = eos if eos >= 0 else None
        pad: int = self._processor.pad_id()
        self.pad = pad if pad >= 0 else None
        self.unk: int | None = self._processor.unk_id()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in ids]))

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(token) for token in range(self.vocab_size)]

    def text_pieces(self) -> list[str]:
        model = self._processor
        return [
            piece
            for token, piece in enumerate(self.pieces())
            if not (model.is_control(token) or model.is_byte(token) or model.is_unknown(token))
        ]

    def control_pieces(self) -> list[str]:
        model = self._processor
        return [
            piece for token, piece in enumerate(self.pieces()) if model.is_control(token) or model.is_unknown(token)
        ]


class HuggingFaceTokenizer:
    """A `tokenizer.json`; a `tokenizer_config.json` beside it may name the end-of-sequence token."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The pool of threads in tokenizers does not survive a fork, and workers are processes here.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.path = str(path)
        try:
            description = json.loads(Path(path).read_text(encoding="utf-8"))
            control = _control_tokens(Path(path), description)
            for token in description.get("added_tokens") or []:
                # Only tokens called special are left alone by encode_special_tokens below.
                token["special"] = bool(token["special"]) or token["content"] in control.values()
            self.description: dict[str, Any] = {**description, "truncation": None, "padding": None}
            """The parsed file; every control token in it is called special."""
            self.definition = json.dumps(self.description, ensure_ascii=False)
            """The same as text."""
            self.roles = control
            """The control tokens by role (`eos_token`, ...)."""
            self._tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.eod: int | None = ids.get(control.get("eos_token", ""))
        self.pad: int | None = ids.get(control.get("pad_token", ""))
        model = self.description["model"]
        self.unk: int | None = ids.get(model.get("unk_token") or control.get("unk_token", ""), model.get("unk_id"))
        self._special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The fast call leaves out the character offsets, which nobody here reads.
        try:
            return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # a character that is not in the vocabulary, which has no token for the unknown
            raise UserError(f"{self.path} cannot encode every text: {error}; take a tokenizer that can") from None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(token) or "" for token in range(self.vocab_size)]

    def text_pieces(self) -> list[str]:
        return [
            piece
            for token, piece in enumerate(self.pieces())
            if piece and token not in self._special and not _is_byte_piece(piece)
        ]

    def control_pieces(self) -> list[str]:
        return [piece for token, piece in enumerate(self.pieces()) if piece and token in self._special]


# How well-known models call these tokens, when no tokenizer_config.json says it.
_USUAL_NAMES = {
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}


def _control_tokens(path: Path, description: dict[str, Any]) -> dict[str, str]:
    """The control tokens by role (`eos_token`, `bos_token`, ...)."""
    config_path = path.with_name("tokenizer_config.json")
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    found = {}
    for role in ("eos_token", "bos_token", "pad_token", "unk_token"):
        # Written either as a string or as a record of one.
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if content:
            found[role] = str(content)
    added = {token["content"]: bool(token["special"]) for token in description.get("added_tokens") or []}
    for role, names in _USUAL_NAMES.items():
        # An end token must be one, whatever the file calls it; what looks like padding may be vocabulary.
        known = next((name for name in names if name in added and (added[name] or role == "eos_token")), None)
        if role not in found and known is not None:
            found[role] = known
    return found


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"the folder {path} holds neither tokenizer.json nor tokenizer.model")
    if not path.exists():
        raise UserError(
            f"there is no tokenizer at {path}; train one with `megatron-ru tokenizer train --output {path}`"
        )
    return path
