import dataclasses
from argparse import Namespace

import pytest

from megatron_ru.models.parameter_count import count_parameters
from megatron_ru.models.step_flops import mfu, peak_tflops, shape_of_arguments, shape_of_variant
from megatron_ru.models.variant import find_variant


def test_ru_7b3_cut_to_8_layers():
    variant = dataclasses.replace(find_variant("ru_7b3"), num_layers=8)
    shape = shape_of_variant(variant)
    assert (shape.vocabulary, shape.hidden, shape.ffn, shape.kv_heads, shape.sequence) == (40064, 4096, 14336, 8, 4096)
    # By hand: 8 layers of 2·4096² + 2·4096·1024 + 3·4096·14336, and the output projection.
    assert shape.matmul_parameters == 8 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 40064 * 4096
    assert shape.attention_flops_per_token == 6 * 8 * 4096 * 4096
    assert shape.flops_per_token / 1e9 == pytest.approx(12.2589, abs=1e-4)


@pytest.mark.parametrize("name", ["ru_7b3", "llama3_8b", "gpt2"])
def test_matrices_are_all_parameters_but_the_lookup_and_the_vectors(name):
    variant = find_variant(name)
    shape = shape_of_variant(variant, vocabulary_multiple=1)
    lookup = 0 if variant.tied_embeddings else variant.vocab_size * variant.hidden_size
    if variant.positions == "learned":
        lookup += variant.position_count * variant.hidden_size
    vectors = count_parameters(variant) - lookup - shape.matmul_parameters
    # Norms and biases are no matrices, and a thousandth of the whole at most.
    assert 0 < vectors < count_parameters(variant) / 1000


def arguments(**changes):
    settings = {
        "num_layers": 8, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "kv_channels": 128,
        "group_query_attention": True, "num_query_groups": 8, "swiglu": True, "padded_vocab_size": 40064,
        "seq_length": 4096, "num_experts": None,
    }  # fmt: skip
    return Namespace(**settings | changes)


def test_arguments_of_megatron_give_the_same_shape():
    variant = dataclasses.replace(find_variant("ru_7b3"), num_layers=8)
    assert shape_of_arguments(arguments()) == shape_of_variant(variant)
    many_heads = shape_of_arguments(arguments(group_query_attention=False, num_query_groups=1))
    assert many_heads.kv_heads == 32


@pytest.mark.parametrize("change", [{"num_experts": 8}, {"multi_latent_attention": True}, {"padded_vocab_size": None}])
def test_what_the_formula_does_not_know_has_no_shape(change):
    assert shape_of_arguments(arguments(**change)) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("Tesla V100-SXM2-16GB", 125),
        # No A40, and nothing that is listed.
        ("NVIDIA RTX A4000", None), ("NVIDIA GeForce RTX 4090", None), ("CPU", None),
    ],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


def test_mfu():
    # The measured 169.86 ms of 8192 tokens on an H200.
    assert mfu(12.258902016e9 * 8192, 0.16986, 1, 989) == pytest.approx(0.598, abs=1e-3)
    assert mfu(1e15, 1.0, 2, 989) == pytest.approx(1e15 / (2 * 989e12))
    assert mfu(1e15, 1.0, 1, None) is None
