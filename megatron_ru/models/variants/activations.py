"""The table of activations: six of them, each with and without biases, in the model before SwiGLU.

All keep the feed-forward width, so a gated one has a third matrix of the same size. `activation_gelu` is the
parent itself, the table's reference line.
"""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2_rope_preln_rmsnorm import gpt2_rope_preln_rmsnorm

_PRINTED = {
    "relu": "ReLU",
    "gelu": "GELU",
    "swish": "Swish",
    "reglu": "ReGLU",
    "geglu": "GEGLU",
    "swiglu": "SwiGLU",
}

ACTIVATION_TABLE = tuple(
    register(
        derive(
            gpt2_rope_preln_rmsnorm,
            f"activation_{activation}" + ("" if bias else "_nobias"),
            f"{printed} {'with' if bias else 'without'} biases, where the parent has GELU with them"
            if (activation, bias) != ("gelu", True)
            else "none: the table's line for GELU with biases",
            activation=activation,
            bias=bias,
        )
    )
    for activation, printed in _PRINTED.items()
    for bias in (True, False)
)
