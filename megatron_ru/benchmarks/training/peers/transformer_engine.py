"""Megatron-Core's own GPT model with TransformerEngine's modules, bf16."""

import importlib.util

from megatron_ru.benchmarks.training.peer import Built, TrainingPeer, register
from megatron_ru.benchmarks.training.peers import mcore
from megatron_ru.models.step_flops import Shape
from megatron_ru.models.variant import Variant


def build(variant: Variant, shape: Shape, device: str) -> Built:
    """Attention, norms, RoPE and linear layers are TransformerEngine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    mcore.start(device)
    spec = get_gpt_layer_with_transformer_engine_spec()
    return mcore.model_of(spec, variant, shape, device, apply_rope_fusion=True)


def missing(device: str) -> str:
    """Why it cannot run here."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    return "TransformerEngine needs a GPU" if device == "cpu" else ""


register(
    TrainingPeer(
        name="te", title="Megatron-Core + TransformerEngine", missing=missing, build=build,
        distributions=("megatron-core", "transformer-engine"),
    )
)  # fmt: skip
