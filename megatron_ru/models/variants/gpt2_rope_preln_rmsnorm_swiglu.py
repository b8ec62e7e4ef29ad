"""Fourth step: SwiGLU (Shazeer, 2020).

The biases of the linear layers go with GELU: in the table of MLP ratios C = 4 has the loss 2.192, which in
the table of activations is SwiGLU without biases (2.191 with them). Parameter counts cannot tell: biases are
0.03% of them.
"""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope_preln_rmsnorm import gpt2_rope_preln_rmsnorm

gpt2_rope_preln_rmsnorm_swiglu = register(
    derive(
        gpt2_rope_preln_rmsnorm,
        "gpt2_rope_preln_rmsnorm_swiglu",
        "SwiGLU without biases instead of GELU with them, at the same feed-forward width",
        activation="swiglu",
        bias=False,
    )
)
