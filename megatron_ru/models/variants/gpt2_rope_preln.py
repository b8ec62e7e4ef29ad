"""Second step: the norm before each block (Xiong et al., 2020)."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope import gpt2_rope

gpt2_rope_preln = register(
    derive(
        gpt2_rope,
        "gpt2_rope_preln",
        "pre-norm instead of post-norm",
        norm_placement="pre",
    )
)
