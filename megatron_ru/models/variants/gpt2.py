"""The ladder's base: the block of 2017, sized as in the 2.6B model that the ladder starts from."""

from megatron_ru.models.variant import Variant, register

gpt2 = register(
    Variant(
        name="gpt2",
        difference="the base: sin/cos positions at the input, post-norm, LayerNorm, GELU, biases, dropout",
        num_layers=32,
        hidden_size=2560,
        num_attention_heads=20,
        vocab_size=50272,
        seq_length=4096,
        mlp_ratio=4.0,
        positions="sinusoidal",
        norm="layernorm",
        norm_placement="post",
        activation="gelu",
        bias=True,
        tied_embeddings=True,
        attention_dropout=0.1,
        hidden_dropout=0.1,
    )
)
