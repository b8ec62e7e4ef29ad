"""Blocks of one length from the documents of a domain, some shards of it at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ru.batches.packing import fill, pack
from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.steps.tokenise import SPLITS, tokenizer_of
from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.loading import Tokenizer, load_tokenizer
from megatron_ru.tokens.encoding import Encoder
from megatron_ru.tokens.indexed_dataset import IndexedDataset


def _groups(run: Run) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(domain, split, files of ids) of each task; shards stay in order."""
    assert run.config.packing is not None
    groups: list[tuple[str, str, list[dict[str, Any]]]] = []
    for entry in run.config.inputs:
        for split in SPLITS:
            members: list[dict[str, Any]] = []
            for file in run.files("tokenise", kind="ids", domain=entry.domain, split=split):
                full = sum(member["tokens"] for member in members) + file["tokens"] > run.config.packing.group_tokens
                if members and full:
                    groups.append((entry.domain, split, members))
                    members = []
                members.append(file)
            if members:
                groups.append((entry.domain, split, members))
    return groups


def _run(run: Run, task: int) -> Outcome:
    assert run.config.packing is not None
    assert run.config.tokens is not None
    domain, split, members = _groups(run)[task]
    settings = run.config.packing
    encoder = tokenizer_of(run.config.tokens.tokenizer)
    pad = padding_of(encoder)
    datasets = [IndexedDataset(str(member["path"])[: -len(".bin")]) for member in members]
    tokens = np.concatenate([np.fromfile(data.bin_path, dtype=data.dtype) for data in datasets])
    lengths = np.concatenate([data.sequence_lengths for data in datasets])
    packing = pack(tokens, lengths, settings.block, settings.kind, line_breaks(encoder))
    outcome = Outcome()
    details = {
        "kind": "blocks", "domain": domain, "split": split, "blocks": packing.blocks, "tokens": packing.tokens,
        "hard_cuts": packing.hard_cuts, "dtype": str(tokens.dtype),
    }  # fmt: skip
    with hashed_output(run.step_folder("pack"), f"{task:06d}.blocks", outcome, **details) as stream:
        for blocks in fill(packing, tokens, pad):
            stream.write(memoryview(np.ascontiguousarray(blocks)).cast("B"))
    outcome.counts.update(
        {
            "documents": len(lengths), "blocks": packing.blocks, "tokens": packing.tokens,
            "padding_tokens": packing.padding, "hard_cuts": packing.hard_cuts, "pieces": len(packing.order),
            f"blocks_{domain}_{split}": packing.blocks,
        }
    )  # fmt: skip
    return outcome


def padding_of(encoder: Encoder) -> int:
    """The id of padding. Raises UserError as `require_padding`."""
    return require_padding(encoder.tokenizer)


def require_padding(tokenizer: Tokenizer) -> int:
    """The id of padding. Raises UserError when there is none, or it is also the end of a document or part of texts:
    then the loss could not leave it out without leaving out these."""
    if tokenizer.pad is None:
        raise UserError(
            f"the tokenizer {tokenizer.path} has no padding token, which packed blocks need; `megatron-ru tokenizer "
            "train` makes tokenizers with one"
        )
    if tokenizer.pad == tokenizer.eod:
        raise UserError(
            f"the tokenizer {tokenizer.path} uses the id {tokenizer.pad} both to pad and to end documents, so that "
            "padding would be trained on; give it a padding token of its own"
        )
    piece = tokenizer.pieces()[tokenizer.pad]
    if tokenizer.encode(piece) == [tokenizer.pad]:
        raise UserError(
            f"the tokenizer {tokenizer.path} pads with {piece!r}, which is also a piece of text, so that the loss "
            "would leave it out there; give it a padding token of its own"
        )
    return tokenizer.pad


def line_breaks(encoder: Encoder) -> npt.NDArray[np.bool_]:
    """Which ids hold a line break, bool [vocabulary]."""
    found = np.zeros(encoder.vocabulary_size, dtype=bool)
    for token, piece in enumerate(encoder.tokenizer.pieces()):
        # As sentencepiece spells the byte, as GPT-2's alphabet of bytes does, and as itself.
        found[token] = piece == "<0x0A>" or "\n" in piece or "Ċ" in piece
    return found


def _settings(config: Any) -> Any:
    require_padding(load_tokenizer(config.tokens.tokenizer))
    return config.packing


def open_blocks(path: Path, dtype: str, block: int) -> npt.NDArray[Any]:
    """The blocks of a file, mapped, [blocks, block]."""
    return np.memmap(path, dtype=dtype, mode="r").reshape(-1, block)


STEPS.register("pack")(
    Step(
        place=70,
        version=1,
        wanted=lambda config: config.packing is not None,
        settings=_settings,
        tasks=lambda run: len(_groups(run)),
        run=_run,
    )
)
