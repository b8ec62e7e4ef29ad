"""Training BPE and unigram tokenizers with Hugging Face's `tokenizers`.

Ids 0 to 3 are `<unk>`, `<s>`, `</s>` and `<pad>`, then come further special tokens. BPE works on bytes and splits
text by the pattern of Qwen 2, GPT-4's with one digit at a time, for which encoding is fastest. Unigram splits at
blanks and line feeds, spells what has no piece in bytes, and puts a blank before a text, as sentencepiece does.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.hugging_face_folder import write_folder
from megatron_ru.tokenizer.patterns import QWEN_2
from megatron_ru.tokenizer.training import SPECIAL_PIECES, TokenizerSettings
from megatron_ru.tokenizer.unigram_scores import out_of_reach

OUR_ROLES = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_PIECES, strict=True))
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train_hugging_face(texts: Iterable[str], output: str | os.PathLike[str], settings: TokenizerSettings) -> int:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json to the folder `output` and returns the
    number of texts learned from.

    Raises UserError when the text is empty or too little for the vocabulary, or the folder cannot be written.
    """
    if settings.normalization == "nmt_nfkc":
        raise UserError("Hugging Face's tokenizers has no nmt_nfkc: choose nfkc, or a .model as the output")
    counted = _Counted(texts)
    special = [*SPECIAL_PIECES, *settings.special_tokens]
    train = _train_bpe if settings.model_type == "bpe" else _train_unigram
    description = train(counted, special, settings)
    if not counted.count:
        raise UserError("there is no text to learn a tokenizer from: every document is empty")
    found = len(description["model"]["vocab"])
    if found != settings.vocab_size:
        raise UserError(
            f"a vocabulary of {settings.vocab_size} is too large for this text: its {counted.count} documents are "
            f"enough for {found} {settings.model_type} pieces; pass --vocab-size {found} or less, or more text"
        )
    write_folder(output, description, OUR_ROLES, settings.special_tokens)
    return counted.count


def _train_bpe(texts: Iterable[str], special: list[str], settings: TokenizerSettings) -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _normalizer(settings)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size, special_tokens=special, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=2 * settings.longest_piece,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return dict(json.loads(tokenizer.to_str()))


def _train_unigram(texts: Iterable[str], special: list[str], settings: TokenizerSettings) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    rule = _normalizer(settings)
    tokenizer.normalizer = normalizers.Sequence(marks if rule is None else [rule, *marks])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=settings.vocab_size, special_tokens=[*special, *BYTE_PIECES], unk_token=SPECIAL_PIECES[0],
        max_piece_length=settings.longest_piece, show_progress=False,
        # Each digit, and the letters of the control pieces: one without a piece would cost more than the control piece.
        initial_alphabet=sorted({*"0123456789", *"".join(special), *"".join(BYTE_PIECES)}),
    )  # fmt: skip
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"tokenizers could not train on this text: {error}") from None
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    model = description["model"]
    model["byte_fallback"] = True
    model["vocab"] = out_of_reach(model["vocab"], {*special, *BYTE_PIECES})
    description["added_tokens"] = [one for one in description["added_tokens"] if one["content"] in special]
    return description


def _normalizer(settings: TokenizerSettings) -> Any:
    from tokenizers import normalizers

    return {"identity": None, "nfc": normalizers.NFC(), "nfkc": normalizers.NFKC()}[settings.normalization]


class _Counted:
    """Texts that are not empty, and how many of them there were."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.count = 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        while not (text := next(self._texts)):
            pass
        self.count += 1
        return text
