"""The table of MLP ratios: C = feed-forward width / hidden size, in the SwiGLU model without biases.

`mlp_ratio_4` is the parent itself, the table's reference line.
"""

from fractions import Fraction

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope_preln_rmsnorm_swiglu import gpt2_rope_preln_rmsnorm_swiglu

_RATIOS = {
    "1": Fraction(1),
    "1_5": Fraction(3, 2),
    "2": Fraction(2),
    "8_3": Fraction(8, 3),
    "3": Fraction(3),
    "3_5": Fraction(7, 2),
    "4": Fraction(4),
}

MLP_RATIO_TABLE = tuple(
    register(
        derive(
            gpt2_rope_preln_rmsnorm_swiglu,
            f"mlp_ratio_{word}",
            f"C = {word.replace('8_3', '8/3').replace('_', '.')}, where the parent has 4"
            if ratio != 4
            else "none: the table's line for C = 4",
            mlp_ratio=float(ratio),
        )
    )
    for word, ratio in _RATIOS.items()
)
