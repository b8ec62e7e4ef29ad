"""Megatron-Core's own GPT model from its local spec, with torch's attention in the place of its own.

Without TransformerEngine its attention writes the scores to memory, which nobody would train with.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ru.benchmarks.training.peer import Built, TrainingPeer, register
from megatron_ru.benchmarks.training.sdpa import causal_attention, fast_kernels
from megatron_ru.foundation.ranks import free_port
from megatron_ru.models.step_flops import Shape
from megatron_ru.models.variant import Variant


class TorchAttention(nn.Module):
    """What Megatron's attention calls in the place of its own."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[sequence, batch, heads·head_dim] from [sequence, batch, heads, head_dim]."""
        q, k, v = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        return causal_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)


def build(variant: Variant, shape: Shape, device: str) -> Built:
    """One rank, all of Megatron-Core's own fusions that need no other package."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    start(device)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = TorchAttention
    return model_of(spec, variant, shape, device)


def start(device: str) -> None:
    """The process groups of a single rank, and its random states."""
    if device == "cpu":
        from megatron_ru.seams.cpu_device import CPU_DEVICE

        CPU_DEVICE.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "nccl" if device == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group(backend, init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if device == "cpu":
        CPU_DEVICE.install_in_megatron()
    model_parallel_cuda_manual_seed(7)


def model_of(spec: Any, variant: Variant, shape: Shape, device: str, **settings: Any) -> Built:
    """The GPT model of a layer spec; `settings` are further fields of its TransformerConfig."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=variant.norm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        # Compiled by torch for a GPU.
        bias_activation_fusion=device == "cuda",
        bias_dropout_fusion=device == "cuda",
        cross_entropy_loss_fusion=device == "cuda",
        **settings,
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.sequence,
        position_embedding_type="rope",
        rotary_base=variant.rotary_base,
        share_embeddings_and_output_weights=False,
    ).to(device, torch.bfloat16)
    positions = torch.arange(shape.sequence, device=device)[None]
    return Built(model=model, loss=partial(_loss, model, positions, device))


def missing(device: str) -> str:
    """Why it cannot run here: megatron-core is a requirement of this package."""
    return ""


def _loss(model: Any, positions: Tensor, device: str, tokens: Tensor, targets: Tensor) -> Tensor:
    with fast_kernels(device):
        result: Tensor = model(tokens, positions.expand_as(tokens), None, labels=targets).mean()
    return result


register(
    TrainingPeer(
        name="mcore", title="Megatron-Core + SDPA", missing=missing, build=build, distributions=("megatron-core",)
    )
)  # fmt: skip
