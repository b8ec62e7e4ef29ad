"""`--ru-attention plain`: attention with its scores in memory, to compare with."""

from typing import Any

from megatron_ru.ops.plain_attention import plain_attention
from megatron_ru.seams.seam import Seam


def attention_seams(args: Any) -> list[Seam]:
    """The seam of `--ru-attention plain` on our own module; none for `fused`."""
    if args.ru_attention == "fused":
        return []
    return [
        Seam(
            target="megatron_ru.models.core_attention:attention",
            make=lambda _: plain_attention,
            expects=("query", "key", "value", "mask", "scale", "dropout"),
            reason="what is only compared with has no place in the module",
        )
    ]
