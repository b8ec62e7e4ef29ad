"""SOLAR 10.7B (Kim et al., 2023; config.json of upstage/SOLAR-10.7B-v1.0): 10,731,524,096 parameters."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.mistral_7b import mistral_7b

solar_10b7 = register(
    derive(
        mistral_7b,
        "solar_10b7",
        "48 layers (Mistral's stacked twice, less 16 at the seam) and no attention window",
        num_layers=48,
        sliding_window=None,
    )
)
