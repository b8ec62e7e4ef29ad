"""Third step: RMSNorm (Zhang and Sennrich, 2019)."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope_preln import gpt2_rope_preln

gpt2_rope_preln_rmsnorm = register(
    derive(
        gpt2_rope_preln,
        "gpt2_rope_preln_rmsnorm",
        "RMSNorm instead of LayerNorm, and no dropout",
        norm="rmsnorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
)
