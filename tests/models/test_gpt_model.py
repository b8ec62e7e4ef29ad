"""Whole models against other people's implementations and against plain torch written here."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megatron_ru.models.parameter_count import count_parameters
from megatron_ru.models.variant import all_variants, find_variant

ACTIVATION = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swish": lambda x: x * torch.sigmoid(x),
}
GATE = {"reglu": "relu", "geglu": "gelu", "swiglu": "swish"}


class PlainGpt:
    """The decoder of a variant in plain torch and float64, with weights under Megatron's names."""

    def __init__(self, variant, weights):
        self.v = variant
        self.w = {name: weight.double() for name, weight in weights.items() if torch.is_tensor(weight)}

    def __call__(self, ids):
        """Logits [batch, sequence, vocabulary] of ids [batch, sequence]."""
        x = self.w["embedding.word_embeddings.weight"][ids]
        if self.v.positions == "sinusoidal":
            # Against embeddings times the root of their size, as the source of the formula has it.
            x = x + self.sinusoids(ids.shape[1]) / self.v.hidden_size**0.5
        if self.v.positions == "learned":
            x = x + self.w["embedding.position_embeddings.weight"][: ids.shape[1]]
        for layer in range(self.v.num_layers):
            x = self.layer(x, f"decoder.layers.{layer}.")
        if self.v.norm_placement == "pre":
            x = self.norm(x, "decoder.final_layernorm")
        output = "embedding.word_embeddings" if self.v.tied_embeddings else "output_layer"
        return x @ self.w[f"{output}.weight"].T

    def layer(self, x, prefix):
        if self.v.norm_placement == "pre":
            x = x + self.attention(self.norm(x, prefix + "input_layernorm"), prefix + "self_attention.")
            return x + self.feed_forward(self.norm(x, prefix + "pre_mlp_layernorm"), prefix + "mlp.")
        x = self.norm(x + self.attention(x, prefix + "self_attention."), prefix + "self_attn_bda.norm")
        return self.norm(x + self.feed_forward(x, prefix + "mlp."), prefix + "mlp_bda.norm")

    def attention(self, x, prefix):
        heads, groups, size = self.v.num_attention_heads, self.v.num_query_groups, self.v.head_size
        if self.v.positions == "sinusoidal_every_layer":
            x = x + self.sinusoids(x.shape[1])
        per_group = heads // groups
        # Each group lies together: its query heads, its key, its value.
        mixed = self.linear(x, prefix + "linear_qkv").view(*x.shape[:2], groups, per_group + 2, size)
        q = mixed[:, :, :, :per_group].flatten(2, 3)
        k, v = (mixed[:, :, :, per_group + i].repeat_interleave(per_group, dim=2) for i in range(2))
        if self.v.positions == "rope":
            q, k = self.turn(q), self.turn(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        context = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return self.linear(context, prefix + "linear_proj")

    def feed_forward(self, x, prefix):
        inner = self.linear(x, prefix + "linear_fc1")
        if self.v.activation in GATE:
            gate, up = inner.tensor_split(2, dim=-1)
            inner = ACTIVATION[GATE[self.v.activation]](gate) * up
        else:
            inner = ACTIVATION[self.v.activation](inner)
        return self.linear(inner, prefix + "linear_fc2")

    def norm(self, x, name):
        if self.v.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.v.norm_epsilon).sqrt() * self.w[name + ".weight"]
        return x + self.w[name + ".bias"] if self.v.norm == "layernorm" else x

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if self.v.bias else y

    def turn(self, x):
        """RoPE over [batch, sequence, heads, size]: channel k and channel k + size/2 are one complex number."""
        half = x.shape[-1] // 2
        speeds = self.v.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * speeds
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def sinusoids(self, length):
        table = torch.empty(length, self.v.hidden_size, dtype=torch.float64)
        for pair in range(self.v.hidden_size // 2):
            angles = torch.arange(length) / 10000 ** (2 * pair / self.v.hidden_size)
            table[:, 2 * pair], table[:, 2 * pair + 1] = angles.double().sin(), angles.double().cos()
        return table


def ids_and_positions(variant, batch=2, length=None, seed=0):
    length = length or variant.seq_length
    ids = torch.randint(variant.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length).expand(batch, length)


def randomise(model, seed=1):
    """Weights an order of magnitude larger than initial ones, biases and norms that are not zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model


VARIANTS = [
    "llama2_tiny", "llama3_tiny", "ru_demo", "gpt2_tiny", "gpt2_pos_every_layer", "rugpt3_13b", "mistral_7b",
    "gpt2_rope", "gpt2_rope_preln", "gpt2_rope_preln_rmsnorm", "gpt2_rope_preln_rmsnorm_swiglu",
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa",
    *(name for name in all_variants() if name.startswith("activation_")),
]  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_plain_torch(build_gpt, name):
    model, variant = build_gpt(name)
    randomise(model).eval()
    ids, positions = ids_and_positions(variant)
    with torch.no_grad():
        found = model(ids, positions, None)
    expected = PlainGpt(variant, model.state_dict())(ids)
    assert expected.std() > 0.1
    # fp32 against fp64: logits of a few units, sums of some thousands of products.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama3_tiny", "gpt2_tiny", "gpt2_pos_every_layer", "activation_reglu"])
def test_gradients_are_those_of_plain_torch(build_gpt, name):
    model, variant = build_gpt(name)
    randomise(model)
    ids, positions = ids_and_positions(variant)
    labels = ids.roll(-1, dims=1)
    model(ids, positions, None, labels=labels).mean().backward()
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for weight in weights.values():
        weight.requires_grad_()
    plain = PlainGpt(variant, weights)
    F.cross_entropy(plain(ids).flatten(0, 1), labels.flatten()).backward()
    for name, parameter in model.named_parameters():
        scale = weights[name].grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, rtol=1e-4, atol=2e-5 * scale, msg=name)


def test_what_distinguishes_the_variants_distinguishes_the_plain_models(build_gpt):
    # Were PlainGpt to ignore a field, the comparison above would prove little.
    model, variant = build_gpt("gpt2_tiny")
    ids, _ = ids_and_positions(variant)
    weights = randomise(model).state_dict()
    base = PlainGpt(variant, weights)(ids)
    for change in ({"positions": "none"}, {"positions": "sinusoidal_every_layer"}, {"activation": "relu"},
                   {"activation": "gelu_tanh"}, {"norm_epsilon": 0.1}, {"bias": False}):  # fmt: skip
        other = PlainGpt(dataclasses.replace(variant, **change), weights)(ids)
        assert (other - base).abs().max() > 5e-4, change


def hugging_face_llama(variant):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=variant.vocab_size,
        hidden_size=variant.hidden_size,
        intermediate_size=variant.ffn_hidden_size,
        num_hidden_layers=variant.num_layers,
        num_attention_heads=variant.num_attention_heads,
        num_key_value_heads=variant.num_query_groups,
        max_position_embeddings=variant.position_count,
        rms_norm_eps=variant.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": variant.rotary_base},
        tie_word_embeddings=variant.tied_embeddings,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def to_hugging_face(weights, variant):
    """Megatron's weights under the names of Hugging Face's Llama."""
    per_group = variant.num_attention_heads // variant.num_query_groups
    rows = [per_group * variant.head_size, variant.head_size, variant.head_size]
    found = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"]),
    }
    for i in range(variant.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        groups = weights[ours + "self_attention.linear_qkv.weight"].view(
            variant.num_query_groups, -1, variant.hidden_size
        )
        for letter, part in zip("qkv", groups.split(rows, dim=1), strict=True):
            found[f"{theirs}self_attn.{letter}_proj.weight"] = part.flatten(0, 1)
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        found |= {
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": weights[ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "pre_mlp_layernorm.weight"],
        }
    return found


@pytest.mark.parametrize("name", ["llama2_tiny", "llama3_tiny", "ru_demo"])
def test_logits_are_those_of_hugging_face(build_gpt, name):
    model, variant = build_gpt(name)
    randomise(model).eval()
    theirs = hugging_face_llama(variant)
    theirs.load_state_dict(to_hugging_face(model.state_dict(), variant))
    ids, positions = ids_and_positions(variant)
    with torch.no_grad():
        difference = model(ids, positions, None) - theirs(ids).logits
    assert theirs(ids).logits.std() > 0.1
    assert difference.abs().max() < 1e-5


def test_an_explicit_causal_mask_changes_nothing(build_gpt):
    model, variant = build_gpt("llama3_tiny")
    ids, positions = ids_and_positions(variant)
    mask = torch.ones(1, 1, variant.seq_length, variant.seq_length).triu(1).bool()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, positions, mask), model(ids, positions, None))


@pytest.mark.parametrize("name", all_variants())
def test_megatron_s_model_has_the_counted_parameters(build_gpt, name):
    # One layer of full width, whose memory is never touched; layers are alike.
    variant = find_variant(name)
    full = {field: getattr(variant, field) for field in ("hidden_size", "num_attention_heads", "vocab_size",
            "seq_length", "max_position_embeddings", "kv_channels", "sliding_window")}  # fmt: skip
    config = {"perform_initialization": False, "params_dtype": torch.bfloat16}
    model, one = build_gpt(name, sizes={**full, "num_layers": 1}, config=config)
    table = sum(p.numel() for n, p in model.named_parameters() if "position_embeddings" in n)
    counted = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.decoder.layers[0].parameters())
    assert counted == count_parameters(one)
    assert counted + (variant.num_layers - 1) * layer == count_parameters(variant)
    assert bool(table) == (variant.positions == "learned")
    assert isinstance(model.decoder.layers[0].mlp, nn.Module)


def test_a_whole_tiny_model_is_counted(build_gpt):
    for name in ("llama2_tiny", "llama3_tiny", "gpt2_tiny"):
        variant = find_variant(name)
        full = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": variant.num_attention_heads,
                "vocab_size": 1000, "seq_length": 256}  # fmt: skip
        model, _ = build_gpt(name, sizes=full)
        assert sum(p.numel() for p in model.parameters()) == count_parameters(variant)
