"""Mistral 7B v0.1 (Jiang et al., 2023; config.json of mistralai/Mistral-7B-v0.1): 7,241,732,096 parameters.

Its attention sees 4096 tokens back. Contexts up to that are full attention, and those are what is run here;
a longer `--seq-length` is refused.
"""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.llama2_7b import llama2_7b

mistral_7b = register(
    derive(
        llama2_7b,
        "mistral_7b",
        "four query heads per key-value head, C = 3.5, attention within a window of 4096 tokens",
        query_heads_per_kv_head=4,
        mlp_ratio=3.5,
        sliding_window=4096,
    )
)
