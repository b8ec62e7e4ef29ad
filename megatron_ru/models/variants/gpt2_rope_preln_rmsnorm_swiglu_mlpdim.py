"""Fifth step: the best MLP ratio."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope_preln_rmsnorm_swiglu import gpt2_rope_preln_rmsnorm_swiglu

gpt2_rope_preln_rmsnorm_swiglu_mlpdim = register(
    derive(
        gpt2_rope_preln_rmsnorm_swiglu,
        "gpt2_rope_preln_rmsnorm_swiglu_mlpdim",
        "feed-forward width C = 3.5 times the hidden size instead of 4",
        mlp_ratio=3.5,
    )
)
