"""Hugging Face's Llama, as its users train it."""

import importlib.util
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.training.peer import Built, TrainingPeer, register
from megatron_ru.benchmarks.training.sdpa import fast_kernels
from megatron_ru.models.step_flops import Shape
from megatron_ru.models.variant import Variant


def build(variant: Variant, shape: Shape, device: str) -> Built:
    """LlamaForCausalLM with torch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.sequence,
        rms_norm_eps=variant.norm_epsilon,
        rope_theta=float(variant.rotary_base),
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.train()
    return Built(model=model, loss=partial(_loss, model, partial(fast_kernels, device)))


def missing(device: str) -> str:
    """Why it cannot run here."""
    return "" if importlib.util.find_spec("transformers") else "transformers is not installed: pip install transformers"


def _loss(model: Any, kernels: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    context: AbstractContextManager[None] = kernels()
    with context:
        # Targets that are shifted already: the model would shift its `labels` by itself.
        result: Tensor = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
    return result


register(
    TrainingPeer(name="hf", title="HF Llama", missing=missing, build=build, distributions=("transformers",))
)  # fmt: skip
