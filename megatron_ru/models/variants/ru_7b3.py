"""The 7.3B Russian and English model at the ladder's end, with the recipe it was trained by."""

from megatron_ru.models.variant import derive, register
from megatron_ru.models.variants import gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa as ladder_end

ru_7b3 = register(
    derive(
        ladder_end.gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa,
        "ru_7b3",
        "4096 channels in 32 heads, 40000 tokens, an output projection of its own",
        hidden_size=4096,
        num_attention_heads=32,
        vocab_size=40000,
        tied_embeddings=False,
        recipe={
            "optimizer": "adam",
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_eps": 1e-8,
            "lr": 3e-4,
            "weight_decay": 0.1,
            "lr_decay_style": "cosine",
            "tokens": 2_000_000_000_000,
            "tokens_per_batch": 4_000_000,
        },
    )
)
