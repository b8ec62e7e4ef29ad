"""Hugging Face's Llama with all of Liger-Kernel: norm, RoPE, SwiGLU, and the loss fused with the output projection."""

import importlib.util

from megatron_ru.benchmarks.training.peer import Built, TrainingPeer, register
from megatron_ru.benchmarks.training.peers import hf
from megatron_ru.models.step_flops import Shape
from megatron_ru.models.variant import Variant


def build(variant: Variant, shape: Shape, device: str) -> Built:
    """The class is patched before it is built, as Liger's README says."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return hf.build(variant, shape, device)


def missing(device: str) -> str:
    """Why it cannot run here."""
    if hf.missing(device):
        return hf.missing(device)
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install liger-kernel"
    return "its kernels need a GPU" if device == "cpu" else ""


register(
    TrainingPeer(
        name="liger", title="HF Llama + Liger", missing=missing, build=build,
        distributions=("transformers", "liger-kernel"),
    )
)  # fmt: skip
