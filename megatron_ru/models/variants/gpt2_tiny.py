"""The ladder's base small enough to train in seconds: sin/cos positions, post-norm, biases, dropout."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2 import gpt2

gpt2_tiny = register(
    derive(
        gpt2,
        "gpt2_tiny",
        "4 layers of 128 channels in 4 heads, 1000 tokens, context 256",
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=1000,
        seq_length=256,
    )
)
