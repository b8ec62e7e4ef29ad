import dataclasses

import pytest

from megatron_ru.models.parameter_count import count_parameters, parameters_on_meta
from megatron_ru.models.variant import all_variants, find_variant

# name: tied, untied, in billions, to 0.5%
RECOMPUTED = {
    "gpt2": (2.65, 2.77),
    "gpt2_rope": (2.65, 2.77),
    "gpt2_rope_preln": (2.65, 2.77),
    "gpt2_rope_preln_rmsnorm": (2.65, 2.77),
    "gpt2_rope_preln_rmsnorm_swiglu": (3.48, 3.61),
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim": (3.17, 3.30),
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa": (2.86, 2.98),
    "ru_7b3": (7.14, 7.31),
}

# Total parameters in the safetensors metadata of Hugging Face's meta-llama/Llama-2-7b-hf,
# meta-llama/Meta-Llama-3-8B, mistralai/Mistral-7B-v0.1, upstage/SOLAR-10.7B-v1.0).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "solar_10b7": 10_731_524_096,
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_counts_of_the_ladder_and_the_final_model(name):
    tied, untied = RECOMPUTED[name]
    assert parameters_on_meta(find_variant(name), tied=True) / 1e9 == pytest.approx(tied, rel=5e-3)
    assert parameters_on_meta(find_variant(name), tied=False) / 1e9 == pytest.approx(untied, rel=5e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_exactly(name):
    assert count_parameters(find_variant(name)) == PUBLISHED[name]


def test_ru_29b_is_29_billion():
    assert count_parameters(find_variant("ru_29b")) / 1e9 == pytest.approx(29, rel=5e-3)


def test_gpt2_small_by_hand():
    # GPT-2 small, Radford et al., 2019: 124,439,808 with a vocabulary of 50257 and 1024 learned positions.
    small = dataclasses.replace(
        find_variant("rugpt3_13b"),
        num_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=50257, seq_length=1024,
    )  # fmt: skip
    assert count_parameters(small) == 124_439_808


@pytest.mark.parametrize("name", all_variants())
@pytest.mark.parametrize("tied", [True, False, None])
def test_the_formula_is_what_the_modules_hold(name, tied):
    v = find_variant(name)
    assert count_parameters(v, tied) == parameters_on_meta(v, tied)


def test_heads_of_their_own_size_count():
    v = dataclasses.replace(find_variant("llama3_tiny"), kv_channels=32)
    # Query, output: 128 x 8·32 each; key, value: 128 x 4·32 each; in place of heads of 16.
    assert count_parameters(v) - count_parameters(find_variant("llama3_tiny")) == 4 * (2 * 128**2 + 2 * 128 * 64)
    assert count_parameters(v) == parameters_on_meta(v)


def test_tying_saves_one_embedding():
    v = find_variant("llama2_tiny")
    assert count_parameters(v, tied=False) - count_parameters(v, tied=True) == 1000 * 128
