"""Where a long text may be cut so that the pieces' tokens, one after the other, are the tokens of the whole.

Two proofs, and no cut where neither holds:

*By the pre-tokenizer.* It is known to end a pre-token between a letter and the blank behind it, whatever follows; it
reads from left to right without looking back, so what follows is split as it would be at the start of a text; and
models never look beyond a pre-token. The patterns of GPT-2, GPT-4, GPT-4o, Llama 3 and Qwen 2 are of this kind.

*By the vocabulary.* BPE without a pre-tokenizer (sentencepiece) merges neighbours only into pieces that are in the
vocabulary. Where no piece has a sign for blank behind another character, nothing is ever merged across that place. Such
a tokenizer puts a blank before every text, so that the one at the cut is left out.
 A unigram model of sentencepiece has the second but for rounding: scores are added up over the whole text in float32,
and in a long sum rounding decides between neighbours. It takes 35 bytes for each character, so that only a text of more
than four million is cut.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ru.tokenizer.fast_form import members
from megatron_ru.tokenizer.loading import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_ru.tokenizer.patterns import SPLIT_AT_BLANKS
from megatron_ru.tokenizer.sentencepiece_model import read_model

_SPACE_SIGN = "▁"


@dataclass(frozen=True, kw_only=True)
class CutRule:
    """A text is cut between a letter and one of `blanks`."""

    blanks: str
    """One or two characters: a space, and with it perhaps a line feed."""

    dropped: bool
    """Whether the next piece begins behind the blank, because the tokenizer puts one there."""

    above: int = 0
    """Only longer texts are cut, into pieces of so many characters: rounding may make other tokens of them."""


def cut_text(text: str, rule: CutRule, size: int) -> Iterator[str]:
    """`text` in pieces of `size` characters and as many more as it takes to the next place for a cut."""
    start = 0
    while (place := _next_place(text, rule, start + size)) is not None:
        yield text[start:place]
        start = place + rule.dropped
    yield text[start:]


def cut_rule(tokenizer: Tokenizer) -> CutRule | None:
    """The rule of `tokenizer`, None where a cut is not proved to change nothing."""
    match tokenizer:
        case SentencePieceTokenizer():
            return _sentencepiece_rule(tokenizer)
        case HuggingFaceTokenizer():
            return _hugging_face_rule(tokenizer)
        case _:
            return None


def _next_place(text: str, rule: CutRule, start: int) -> int | None:
    """The first blank at `start` or behind it that has a letter before it and something after it."""
    for found in re.compile(f"[{rule.blanks}]").finditer(text, max(start, 1)):
        place = found.start()
        if text[place - 1].isalpha() and place + 1 < len(text):
            return place
    return None


def _sentencepiece_rule(tokenizer: SentencePieceTokenizer) -> CutRule | None:
    model = read_model(tokenizer.path)
    plain = model.keeps_every_character and model.adds_prefix and not model.has_user_pieces
    if model.type_name not in ("bpe", "unigram") or not plain or not _no_piece_crosses(tokenizer.pieces()):
        return None
    return CutRule(blanks=" ", dropped=True, above=0 if model.is_bpe else _LONGEST_UNIGRAM_TEXT)


_LONGEST_UNIGRAM_TEXT = 1 << 22


def _no_piece_crosses(pieces: list[str]) -> bool:
    return not any(re.search(f"[^{_SPACE_SIGN}]{_SPACE_SIGN}", piece) for piece in pieces)


def _hugging_face_rule(tokenizer: HuggingFaceTokenizer) -> CutRule | None:
    description = tokenizer.description
    for token in description.get("added_tokens") or []:
        # Special ones are never looked for. The others are found before anything else, so they must not lie across a
        # cut.
        around = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if not token["special"] and (around or re.search(r"\s", token["content"])):
            return None
    normalizers = members(description.get("normalizer"), "normalizers")
    splitters = members(description.get("pre_tokenizer"), "pretokenizers")
    if _is_sentencepiece_normalizer(normalizers) and not splitters and _is_plain_bpe(description["model"]):
        pieces = tokenizer.pieces()
        return CutRule(blanks=" ", dropped=True) if _SPACE_SIGN in pieces and _no_piece_crosses(pieces) else None
    kinds = [_splitting(one) for one in splitters]
    if _is_sentencepiece_normalizer(normalizers) and "spaces" in kinds and "unknown" not in kinds:
        return CutRule(blanks=" ", dropped=True)
    if not all(one["type"] in _BLIND_NORMALIZERS for one in normalizers):
        return None
    if "unknown" in kinds or not {"blanks", "spaces"} & set(kinds):
        return None
    # A normaliser may turn a letter into a letter and a mark, behind which some patterns take line feeds along.
    return CutRule(blanks=" \n" if "blanks" in kinds and not normalizers else " ", dropped=False)


# These look at no more than a character and the marks on it, and a space takes no part in what they do.
_BLIND_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")


def _splitting(pre_tokenizer: dict[str, Any]) -> str:
    """What it does between a letter and a blank: always splits there (`blanks`), or at a space (`spaces`); nothing that
    depends on the neighbours (`none`); or who knows (`unknown`)."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "blanks" if pre_tokenizer.get("use_regex", True) else "none"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return "blanks" if pattern in SPLIT_AT_BLANKS else "unknown"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return "blanks" if pattern in SPLIT_AT_BLANKS else "unknown"
        case {"type": "WhitespaceSplit" | "Whitespace"}:
            return "blanks"
        case {"type": "Metaspace", "replacement": "▁"}:
            # It puts its sign before a text that does not begin with one, and the piece behind a cut does.
            return "spaces" if pre_tokenizer.get("split", True) else "unknown"
        case {"type": "Digits"} | {"type": "Split", "pattern": {"String": "\n"}}:
            return "none"
        case _:
            return "unknown"


def _is_sentencepiece_normalizer(normalizers: list[dict[str, Any]]) -> bool:
    match normalizers:
        case [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]:
            return True
        case _:
            return False


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    # With ignore_merges a text that is a piece is that piece; a text cut in two may be one where the whole is not.
    return model.get("type", "BPE") == "BPE" and not affixes and not model.get("ignore_merges")
