"""Before training Megatron calls the functions that torch compiles, so that they are compiled: for seconds at each
start, and most of them are never called again where our ops stand in their places. The first call compiles as well."""

from megatron_ru.seams.seam import Seam


def jit_warm_up_seams() -> list[Seam]:
    """The seam that leaves these calls out."""
    return [
        Seam(
            target="megatron.training.training:set_jit_fusion_options",
            make=lambda original: lambda *arguments, **keywords: None,
            reason="Megatron compiles at each start what the run may not use",
        )
    ]
