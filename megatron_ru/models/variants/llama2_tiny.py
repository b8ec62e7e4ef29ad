"""LLaMA 2 small enough to train in seconds: divides by TP 4, PP 4, and two virtual stages at PP 2.

1000 tokens are padded to 1024 for every TP up to 8, and by every supported Megatron's null tokenizer alike.
"""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.llama2_7b import llama2_7b

llama2_tiny = register(
    derive(
        llama2_7b,
        "llama2_tiny",
        "4 layers of 128 channels in 4 heads, 1000 tokens, context 256",
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=1000,
        seq_length=256,
        mlp_ratio=352 / 128,
    )
)
