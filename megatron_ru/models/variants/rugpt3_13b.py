"""ruGPT-3.5 13B (config.json of ai-forever/ruGPT-3.5-13B): GPT-2's block with 5120 channels."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants.gpt2 import gpt2

rugpt3_13b = register(
    derive(
        gpt2,
        "rugpt3_13b",
        "learned positions, pre-norm, the tanh form of GELU; 40 layers of 5120 channels, context 2048",
        positions="learned",
        norm_placement="pre",
        activation="gelu_tanh",
        num_layers=40,
        hidden_size=5120,
        num_attention_heads=40,
        seq_length=2048,
    )
)
