"""LLaMA 3 8B (config.json of meta-llama/Meta-Llama-3-8B): 8,030,261,248 parameters."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.llama2_7b import llama2_7b

llama3_8b = register(
    derive(
        llama2_7b,
        "llama3_8b",
        "four query heads per key-value head, C = 3.5, 128256 tokens, context 8192 with RoPE base 500000",
        query_heads_per_kv_head=4,
        mlp_ratio=3.5,
        vocab_size=128256,
        seq_length=8192,
        rotary_base=500000,
    )
)
