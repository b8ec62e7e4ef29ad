"""LLaMA 3 small enough to train in seconds: grouped-query attention that TP 4 still divides."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.llama3_8b import llama3_8b

llama3_tiny = register(
    derive(
        llama3_8b,
        "llama3_tiny",
        "4 layers of 128 channels in 8 heads, two query heads per key-value head, 1000 tokens, context 256",
        num_layers=4,
        hidden_size=128,
        num_attention_heads=8,
        query_heads_per_kv_head=2,
        vocab_size=1000,
        seq_length=256,
    )
)
