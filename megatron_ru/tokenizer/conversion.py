"""A sentencepiece .model as a Hugging Face tokenizer.json, and back.
 From a .model: BPE without normalisation rules, or unigram; the blank before a text, the sign `▁`, bytes for
characters without a piece and the control pieces are carried over. Back: only a tokenizer.json of that same shape,
since sentencepiece knows no byte-level alphabet and no pre-tokenizer. Whether the two are equal on text is not
promised here; it is looked at by `tokenizer.equality`.
 sentencepiece merges by the score of the result, from left to right; tokenizers by the rank of the pair. Pairs with
the same result have one score and ranks of their own, so that runs of one character could differ.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.sentencepiece_model import PieceKind, SentencePieceModel, new_message, read_model
from megatron_ru.tokenizer.unigram_scores import out_of_reach

_SPACE_SIGN = "▁"


def hugging_face_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a tokenizer.json for the .model at `path`.

    Raises UserError when it normalises by rules, folds blanks, or is neither BPE nor unigram.
    """
    model = read_model(path)
    _require_convertible(model, path)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number, "content": piece.text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for number, piece in enumerate(model.pieces)
            if piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
        ],
        "normalizer": _sequence("normalizers", _normalizers(model)),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _bpe(model) if model.is_bpe else _unigram(model),
    }  # fmt: skip


def bpe_description(path: str | os.PathLike[str]) -> str:
    """The text of a tokenizer.json for a BPE .model. Raises UserError for another kind."""
    if not read_model(path).is_bpe:
        raise UserError("fastokens is for BPE, and this sentencepiece model is none")
    return json.dumps(hugging_face_description(path), ensure_ascii=False)


def sentencepiece_bytes(description: dict[str, Any], roles: dict[str, str]) -> bytes:
    """The .model for the contents of a tokenizer.json; `roles` names its control tokens (`bos_token`, `eos_token`, …).

    Raises UserError when sentencepiece cannot express it.
    """
    kind, byte_fallback, prefix = _expressible(description)
    message = new_message()
    special = {token["content"] for token in description.get("added_tokens") or [] if token["special"]}
    model = description["model"]
    pieces = _scored_pieces(model, kind)
    unknown = model.get("unk_token") if kind == "bpe" else pieces[model["unk_id"]][0]
    if unknown is None:
        raise UserError("this tokenizer.json has no unknown token, which sentencepiece requires; add one")
    for text, score in pieces:
        piece = message.pieces.add()
        piece.piece, piece.score = text, score
        piece.type = _kind_of(text, unknown, special, byte_fallback)
    trainer, normalizer = message.trainer_spec, message.normalizer_spec
    trainer.model_type = type(trainer).ModelType.Value(kind.upper())
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = byte_fallback
    ids = {text: number for number, (text, _) in enumerate(pieces)}
    trainer.unk_id = ids[unknown]
    for field in ("bos", "eos", "pad"):
        name = roles.get(f"{field}_token", "")
        setattr(trainer, f"{field}_id", ids.get(name, -1))
        if name in ids:
            setattr(trainer, f"{field}_piece", name)
    trainer.unk_piece = unknown
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(message.SerializeToString())


def _require_convertible(model: SentencePieceModel, path: str | os.PathLike[str]) -> None:
    wrong = None
    if model.type_name not in ("bpe", "unigram"):
        wrong = f"its type is {model.type_name}; bpe and unigram can be converted"
    elif model.has_rules:
        wrong = f"it normalises text ({model.normalization}), and Hugging Face applies such rules in another way"
    elif not model.keeps_every_character:
        wrong = "it folds or strips blanks; train one that keeps them"
    elif model.has_user_pieces:
        wrong = "it has user-defined pieces, which Hugging Face looks for before it marks blanks"
    if wrong:
        raise UserError(f"cannot convert {path} to tokenizer.json: {wrong}")


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": model.pieces[model.ids["unk"]].text,
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
        "byte_fallback": model.byte_fallback, "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in _merges(model)],
    }  # fmt: skip


def _merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    """Pairs of pieces whose joined text is a piece, the best score first."""
    ids = {piece.text: number for number, piece in enumerate(model.pieces) if piece.kind is PieceKind.NORMAL}
    # Stable: of pairs with one score, those of the smaller id come first.
    for piece in sorted((model.pieces[number] for number in ids.values()), key=lambda piece: -piece.score):
        pairs = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    unreachable = {piece.text for piece in model.pieces if piece.kind is not PieceKind.NORMAL}
    return {
        "type": "Unigram", "unk_id": model.ids["unk"], "byte_fallback": model.byte_fallback,
        "vocab": out_of_reach([[piece.text, piece.score] for piece in model.pieces], unreachable),
    }  # fmt: skip


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    prefix = [{"type": "Prepend", "prepend": _SPACE_SIGN}] if model.adds_prefix else []
    return [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_SIGN}]


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.adds_prefix else []
    return [
        {"type": "Replace", "pattern": {"String": _SPACE_SIGN}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]


def _sequence(key: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(parts)}


def _expressible(description: dict[str, Any]) -> tuple[str, bool, bool]:
    """The type for sentencepiece, whether bytes stand in, and whether a blank is put before a text."""
    model = description["model"]
    kind = model.get("type", "BPE").lower()
    parts = description.get("normalizer") or {}
    normalizers = parts.get("normalizers", [parts] if parts else [])
    prefix = bool(normalizers) and normalizers[0] == {"type": "Prepend", "prepend": _SPACE_SIGN}
    sign = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_SIGN}
    wrong = None
    if kind not in ("bpe", "unigram"):
        wrong = f"its model is {kind}; bpe and unigram can be converted"
    elif description.get("pre_tokenizer") is not None:
        wrong = f"sentencepiece has no pre-tokenizer such as its {description['pre_tokenizer']['type']}"
    elif normalizers[prefix:] != [sign]:
        wrong = "its normaliser is another one than `▁` for each blank"
    elif kind == "bpe" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        wrong = "its pieces have affixes, which sentencepiece does not know"
    if wrong:
        raise UserError(f"cannot convert this tokenizer.json to a sentencepiece .model: {wrong}")
    return kind, bool(model.get("byte_fallback")), prefix


def _scored_pieces(model: dict[str, Any], kind: str) -> list[tuple[str, float]]:
    """(piece, score) by id: a merged piece has minus the rank of its first merge, others come behind all of them."""
    if kind == "unigram":
        return [(text, score) for text, score in model["vocab"]]
    ranks: dict[str, int] = {}
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, len(ranks))
    ordered = sorted(model["vocab"].items(), key=lambda entry: entry[1])
    if [number for _, number in ordered] != list(range(len(ordered))):
        raise UserError("the ids of this tokenizer.json have gaps, and those of sentencepiece have none")
    return [(text, -float(ranks.get(text, len(ranks) + number))) for text, number in ordered]


def _kind_of(text: str, unknown: str, special: set[str], byte_fallback: bool) -> PieceKind:
    if text == unknown:
        return PieceKind.UNKNOWN
    if text in special:
        return PieceKind.CONTROL
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return PieceKind.BYTE if byte_fallback and is_byte else PieceKind.NORMAL
