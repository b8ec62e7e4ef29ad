"""Datasets whose documents are blocks of one length, read so that each sample is one block.

By itself GPTDataset draws sequences with one token more than a sample has, so that the last target of each sample is
the first token of another block, and all later samples begin one token further into theirs. Without that token every
sample is a block, its padding and its last position have no loss. Megatron has the option and no flag for it, and
leaves it out of the names under which it caches its index.
"""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_ru.batches.packed import PackedDataset, packed_path, read_packed
from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.checks import data_prefixes
from megatron_ru.seams.seam import Seam
from megatron_ru.tokenizer.loading import load_tokenizer

_OPTION = "add_extra_token_to_sequence"


def is_packed(args: argparse.Namespace) -> bool:
    """Whether the run reads packed datasets: as `--ru-packed` says, or else as the datasets themselves do.

    Raises `UserError` where only some of them are packed, for another sequence length than the blocks have, and for
    a tokenizer that pads with another id.
    """
    wanted = getattr(args, "ru_packed", None)
    if wanted is False:
        return False
    prefixes = data_prefixes(args)
    found = {prefix: read_packed(prefix) for prefix in prefixes}
    packed = {prefix: entry for prefix, entry in found.items() if entry is not None}
    if wanted is None and not packed:
        return False
    if len(packed) < len(prefixes) or not packed:
        loose = next((prefix for prefix in prefixes if prefix not in packed), "none")
        raise UserError(
            f"{loose} is no packed dataset (it has no {packed_path(loose)}), but "
            + ("--ru-packed was given" if wanted else f"{next(iter(packed))} is one")
            + "; pack all of them with megatron-ru data run, or pass --no-ru-packed to read blocks as running text"
        )
    for prefix, entry in packed.items():
        _check(args, prefix, entry)
    return True


def packed_data_seams(args: argparse.Namespace) -> list[Seam]:
    """The seams of a run that reads packed datasets; none for another."""
    if not is_packed(args):
        return []
    return [
        Seam(
            target="megatron.core.datasets.gpt_dataset:GPTDatasetConfig.__post_init__",
            make=_without_extra_token,
            reason="the option has no flag",
        ),
        Seam(
            target="megatron.core.datasets.gpt_dataset:GPTDataset._key_config_attributes",
            make=_with_option_in_key,
            reason="an index that was cached without the option would be taken",
        ),
        Seam(
            target="megatron.core.datasets.gpt_dataset:GPTDataset.__getitem__",
            make=_with_clean_mask,
            expects=("idx",),
            reason="the loss mask that is kept for all samples has the padding of the first",
        ),
    ]


def _without_extra_token(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def post_init(self: Any) -> None:
        if not hasattr(self, _OPTION):
            raise UserError(f"GPTDatasetConfig of this megatron-core has no {_OPTION}: packed datasets cannot be read")
        setattr(self, _OPTION, False)
        original(self)

    return post_init


def _with_option_in_key(original: Callable[[], list[str]]) -> Any:
    return staticmethod(lambda: [*original(), _OPTION])


def _with_clean_mask(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def getitem(self: Any, idx: Any) -> Any:
        first = not self.masks_and_position_ids_are_cached
        sample = original(self, idx)
        if first and self.masks_and_position_ids_are_cached:
            # It is kept only where no option hides anything: without padding it is ones.
            self.cached_loss_mask = self.cached_loss_mask.new_ones(self.cached_loss_mask.shape)
        return sample

    return getitem


def _check(args: argparse.Namespace, prefix: str, packed: PackedDataset) -> None:
    if packed.block != args.seq_length:
        raise UserError(
            f"{prefix} is packed in blocks of {packed.block} tokens, but --seq-length is {args.seq_length}; give "
            f"--seq-length {packed.block}, or pack again"
        )
    if args.tokenizer_model is None:
        return
    tokenizer = load_tokenizer(args.tokenizer_model)
    if tokenizer.pad != packed.pad or tokenizer.pad == tokenizer.eod:
        raise UserError(
            f"{prefix} is padded with the id {packed.pad}, but {args.tokenizer_model} pads with {tokenizer.pad} and "
            f"ends documents with {tokenizer.eod}: padding would be trained on; pack again with this tokenizer, and "
            "one whose padding is an id of its own"
        )
