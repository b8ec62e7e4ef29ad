"""LLaMA 2 7B (Touvron et al., 2023; config.json of meta-llama/Llama-2-7b-hf): 6,738,415,616 parameters."""

from megatron_ru.models.variant import Variant, register

llama2_7b = register(
    Variant(
        name="llama2_7b",
        difference="LLaMA 2 7B: RoPE, pre-norm RMSNorm, SwiGLU, no biases, multi-head attention",
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        vocab_size=32000,
        seq_length=4096,
        mlp_ratio=11008 / 4096,
        recipe={
            "optimizer": "adam",
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_eps": 1e-5,
            "lr": 3e-4,
            "weight_decay": 0.1,
            "lr_decay_style": "cosine",
            "clip_grad": 1.0,
            "tokens": 2_000_000_000_000,
            "tokens_per_batch": 4_000_000,
        },
    )
)
