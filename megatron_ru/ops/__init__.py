"""The arithmetic of the model, one op per file: the fused call, its plain torch form, its formula in float64."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`megatron_ru.ops.patch_hf_llama`, whose module imports torch and therefore comes when it is asked for."""
    if name == "patch_hf_llama":
        from megatron_ru.ops.hf_llama import patch_hf_llama

        return patch_hf_llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
