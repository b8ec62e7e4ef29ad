"""The 29B sibling of `ru_7b3`: deeper and wider, its sizes chosen here because none were published.

Kept from the ladder: C = 3.5 and four query heads per key-value head. What is left are depth and width.
6144 channels make 64 heads of 96, 16 key-value heads and 3.5·6144 = 21504 = 8·2688 feed-forward columns, so
TP = 8 and 16 divide everything. Heads of 128 would need 8192 channels for that, and 29B would then be 32
layers, no deeper than the 7B.
58 layers: 28.95B parameters, 0.2% below 29B. With the embedding and the output projection counted as a layer
each (`--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split`) they make 60, which
PP = 2, 3, 4, 5, 6, 10 and 12 divide; LLaMA 3.1 405B has 126 layers for the same reason (Grattafiori et al.,
2024, "The Llama 3 Herd of Models", section 3.3.2).
"""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.ru_7b3 import ru_7b3

ru_29b = register(
    derive(
        ru_7b3,
        "ru_29b",
        "58 layers of 6144 channels in 64 heads",
        num_layers=58,
        hidden_size=6144,
        num_attention_heads=64,
    )
)
