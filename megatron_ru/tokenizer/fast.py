"""BPE by the package `fastokens`, where it gives the ids that the tokenizer's own library gives.
 fastokens reads tokenizer.json; a sentencepiece BPE model is converted to one in memory. Its claim to be equal is not
taken on trust: a list of difficult texts is encoded both ways before it is used at all. That finds, for one, that
fastokens 0.3.5 takes a literal `<0x0A>` for the byte where the vocabulary has no `A`.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.conversion import bpe_description
from megatron_ru.tokenizer.difficult_texts import difficult_texts
from megatron_ru.tokenizer.fast_form import fast_form
from megatron_ru.tokenizer.loading import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer


class FastEngine:
    """A tokenizer.json in fastokens. Special tokens spelled out in a text are text."""

    def __init__(self, description: str) -> None:
        # One thread: workers are processes. Read when its pool of threads starts, at the first batch.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_json_str(description)

    def encode_flat(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        """The ids of all texts one after the other, and how many each has. May raise anything, a Rust panic too."""
        ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int32)


def fast_engine(tokenizer: Tokenizer) -> tuple[FastEngine | None, str]:
    """The engine, and the empty string; or None, and why there is none."""
    if importlib.util.find_spec("fastokens") is None:
        return None, "the package fastokens is not installed: pip install 'megatron-ru[data]'"
    try:
        description = _bpe_of(tokenizer)
        engine = FastEngine(description)
        difference = _first_difference(engine, tokenizer)
    except UserError as error:
        return None, str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is a BaseException
        return None, f"fastokens does not take this tokenizer ({error})"
    if difference is not None:
        return None, f"fastokens gives other ids for {difference[:60]!r}"
    return engine, ""


def _bpe_of(tokenizer: Tokenizer) -> str:
    """The tokenizer.json of a BPE tokenizer. Raises UserError for others."""
    match tokenizer:
        case HuggingFaceTokenizer():
            model: dict[str, Any] = tokenizer.description["model"]
            # A file may leave the type out.
            if model.get("type", "BPE") != "BPE" or "merges" not in model:
                raise UserError(f"fastokens is for BPE, and this tokenizer is {model.get('type')}")
            if model.get("dropout"):
                raise UserError("merges of this tokenizer are dropped at random")
            fast = {**tokenizer.description, "pre_tokenizer": fast_form(tokenizer.description.get("pre_tokenizer"))}
            return json.dumps(fast, ensure_ascii=False)
        case SentencePieceTokenizer():
            return bpe_description(tokenizer.path)
        case _:
            raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json")


def _first_difference(engine: FastEngine, tokenizer: Tokenizer) -> str | None:
    texts = difficult_texts(tokenizer.control_pieces())
    ids, lengths = engine.encode_flat(texts)
    ends = np.cumsum(lengths)
    for text, end, length, expected in zip(texts, ends, lengths, tokenizer.encode_batch(texts), strict=True):
        if not np.array_equal(ids[end - length : end], expected):
            return text
    return None
