"""Positions at every layer: tried beside the ladder, and worse."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2 import gpt2

gpt2_pos_every_layer = register(
    derive(
        gpt2,
        "gpt2_pos_every_layer",
        "the sin/cos positions are added before every attention, not once at the input",
        positions="sinusoidal_every_layer",
    )
)
