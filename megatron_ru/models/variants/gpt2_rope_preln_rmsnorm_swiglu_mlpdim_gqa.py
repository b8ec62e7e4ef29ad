"""Last step: grouped-query attention (Ainslie et al., 2023)."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope_preln_rmsnorm_swiglu_mlpdim import (
    gpt2_rope_preln_rmsnorm_swiglu_mlpdim,
)

gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa = register(
    derive(
        gpt2_rope_preln_rmsnorm_swiglu_mlpdim,
        "gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa",
        "four query heads share a key-value head",
        query_heads_per_kv_head=4,
    )
)
