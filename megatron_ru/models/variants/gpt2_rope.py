"""First step: rotary positions (Su et al., 2021)."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2 import gpt2

gpt2_rope = register(
    derive(
        gpt2,
        "gpt2_rope",
        "RoPE instead of sin/cos positions",
        positions="rope",
    )
)
