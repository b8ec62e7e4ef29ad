"""The demo's model: `ru_7b3` scaled down to learn Russian dictionary entries on two CPU cores in minutes."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.ru_7b3 import ru_7b3

ru_demo = register(
    derive(
        ru_7b3,
        "ru_demo",
        "4 layers of 192 channels in 8 heads, 4096 tokens, context 128, tied embeddings",
        num_layers=4,
        hidden_size=192,
        num_attention_heads=8,
        vocab_size=4096,
        seq_length=128,
        tied_embeddings=True,
    )
)
