"""The ids of each shard, one dataset for training and one of the documents held out."""

import hashlib
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ru.data.outcome import Outcome, file_entry
from megatron_ru.data.run import Run
from megatron_ru.data.step import STEPS, Step
from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import text_of
from megatron_ru.tokens.encoding import Encoder, load_encoder
from megatron_ru.tokens.indexed_dataset import dataset_paths, write_dataset

SPLITS = ("train", "valid")

_BATCH_CHARACTERS = 1 << 17


def _run(run: Run, task: int) -> Outcome:
    settings = run.config.tokens
    assert settings is not None
    shard = run.files(run.last_step_with("shard"), kind="shard")[task]
    encoder = tokenizer_of(settings.tokenizer)
    while True:
        differed = encoder.counts.differed
        outcome = _encoded(run, shard, encoder)
        # At the first difference the encoder goes over to the tokenizer's own library; what this shard had before, it
        # gets again.
        if encoder.counts.differed == differed:
            return outcome


def _encoded(run: Run, shard: dict[str, Any], encoder: Encoder) -> Outcome:
    settings = run.config.tokens
    assert settings is not None
    outcome = Outcome()
    prefix = run.step_folder("tokenise") / Path(shard["name"]).stem
    with ExitStack() as stack:
        writers = [stack.enter_context(write_dataset(f"{prefix}.{split}", encoder.vocabulary_size)) for split in SPLITS]
        for texts in _batches(shard["path"], run.config.text_field):
            ids, lengths = _with_ends(encoder, texts)
            # Some call the token that ends documents unknown too, which then has no other use.
            if encoder.tokenizer.unk != encoder.eos and (
                unknown := int(np.count_nonzero(ids == encoder.tokenizer.unk))
            ):
                outcome.counts["unknown_tokens"] += unknown
            held_out = np.array([is_held_out(text, settings.held_out) for text in texts])
            token_held_out = np.repeat(held_out, lengths)
            for writer, mine, mine_tokens in zip(
                writers, (~held_out, held_out), (~token_held_out, token_held_out), strict=True
            ):
                writer.add_documents(ids[mine_tokens], lengths[mine])
            outcome.counts["documents"] += len(texts)
            outcome.counts["tokens"] += int(lengths.sum())
            for name, value in _sizes(texts).items():
                outcome.counts[f"{name}_{shard['domain']}"] += value
            outcome.counts[f"tokens_{shard['domain']}"] += int(lengths.sum()) - int((lengths > 0).sum())
            outcome.measure("tokens", lengths)
        counts = [(writer.documents, writer.tokens) for writer in writers]
    for split, (documents, tokens) in zip(SPLITS, counts, strict=True):
        bin_path, idx_path = dataset_paths(f"{prefix}.{split}")
        if documents == 0:
            bin_path.unlink()
            idx_path.unlink()
            continue
        outcome.counts[f"documents_{split}"] += documents
        details = {"domain": shard["domain"], "split": split, "documents": documents, "tokens": tokens}
        outcome.files.append(file_entry(bin_path, kind="ids", **details))
        outcome.files.append(file_entry(idx_path, kind="index", **details))
    return outcome


@lru_cache(maxsize=1)
def tokenizer_of(path: str) -> Encoder:
    """The encoder in `path`, loaded once for each process."""
    return load_encoder(path)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to validation: by a hash of its text, so for ever and in every order."""
    if share == 0:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _batches(path: Any, text_field: str) -> Any:
    texts: list[str] = []
    size = 0
    with open(path, "rb") as stream:
        for line in stream:
            text = text_of(line, text_field)
            texts.append(text)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield texts
                texts, size = [], 0
    if texts:
        yield texts


def _with_ends(encoder: Encoder, texts: list[str]) -> tuple[Any, Any]:
    """The ids of all texts, each that has any ended by the end-of-document token, and their lengths."""
    ids, lengths = encoder.encode_flat(texts)
    filled = lengths > 0
    assert encoder.eos is not None
    return np.insert(ids, np.cumsum(lengths)[filled], encoder.eos), (lengths + filled).astype(np.int32)


def _sizes(texts: list[str]) -> dict[str, int]:
    return {
        "characters": sum(map(len, texts)),
        "words": sum(len(text.split()) for text in texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }


def _settings(config: Any) -> Any:
    from megatron_ru.tokenizer.loading import load_tokenizer

    tokenizer = load_tokenizer(config.tokens.tokenizer)
    # Said before hours of reading, not behind them.
    if tokenizer.eod is None:
        raise UserError(
            f"the tokenizer {tokenizer.path} has no end-of-sequence token to end documents with; take one that has"
        )
    content = hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest()
    found = {"tokenizer": content, "held_out": config.tokens.held_out, "text_field": config.text_field}
    # Beside a tokenizer.json another file may say which tokens these are; a .model holds all of it.
    return found | {"eod": tokenizer.eod, "pad": tokenizer.pad} if tokenizer.path.endswith(".json") else found


STEPS.register("tokenise")(
    Step(
        place=60,
        version=1,
        wanted=lambda config: config.tokens is not None,
        settings=_settings,
        tasks=lambda run: len(run.files(run.last_step_with("shard"), kind="shard")),
        run=_run,
    )
)
