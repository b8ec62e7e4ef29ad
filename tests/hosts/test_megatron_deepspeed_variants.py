"""Variants in the host's words: sizes refine, kinds decide, and what the host cannot say is refused."""

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts.megatron_deepspeed_arguments import extend_parser
from megatron_ru.hosts.megatron_deepspeed_variants import beyond_host, host_arguments
from megatron_ru.models.variant import all_variants, find_variant
from tests.hosts.deepspeed_parser import host_parser


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")


def parsed(*words):
    return extend_parser(host_parser(), lambda args: None).parse_args(["--micro-batch-size", "1", *words])


def refusal(*words):
    with pytest.raises(UserError) as error:
        parsed(*words)
    return str(error.value)


def test_a_variant_decides_the_host_s_arguments():
    args = vars(parsed("--ru-variant", "llama3_tiny", "--tokenizer-type", "NullTokenizer"))
    expected = {
        "num_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "kv_channels": 16,
        "ffn_hidden_size": 448, "seq_length": 256, "max_position_embeddings": 8192, "normalization": "rmsnorm",
        "layernorm_epsilon": 1e-5, "use_rotary_position_embeddings": True, "add_position_embedding": False,
        "rope_theta": 500000, "rotary_percent": 1.0, "swiglu": True, "bias_gelu_fusion": False,
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "num_experts": [1],
        # The null tokenizer adds one.
        "vocab_size": 999,
    }  # fmt: skip
    variant = find_variant("llama3_tiny")
    expected |= {
        "ffn_hidden_size": variant.ffn_hidden_size, "max_position_embeddings": variant.position_count,
        "rope_theta": variant.rotary_base,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_sizes_refine_and_widths_follow():
    args = parsed(
        "--ru-variant", "llama3_tiny", "--num-layers", "2", "--hidden-size", "256",
        "--rotary-position-embeddings-theta", "7", "--ru-tie-embeddings",
    )  # fmt: skip
    variant = find_variant("llama3_tiny")
    assert (args.num_layers, args.hidden_size, args.rope_theta) == (2, 256, 7)
    assert (args.ffn_hidden_size, args.kv_channels) == (2 * variant.ffn_hidden_size, 32)
    assert args.untie_embeddings_and_output_weights is False


def test_a_recipe_gives_defaults():
    args = parsed("--ru-variant", "ru_7b3", "--weight-decay", "0.5")
    assert (args.lr, args.adam_beta2, args.lr_decay_style, args.weight_decay) == (3e-4, 0.95, "cosine", 0.5)


def test_gelu_by_its_form():
    by_form = {variant.activation: host_arguments(variant) for variant in all_variants().values()
               if not beyond_host(variant) and not variant.gated}  # fmt: skip
    assert {form: values["bias_gelu_fusion"] for form, values in by_form.items()} == {
        form: form == "gelu_tanh" for form in by_form
    }
    assert "gelu_tanh" in by_form


@pytest.mark.parametrize(
    ("words", "flag", "decided"),
    [
        ("--normalization layernorm", "--normalization layernorm", "normalization = rmsnorm"),
        ("--num-key-value-heads 2", "--num-key-value-heads 2", "num key value heads = 4"),
        ("--squared-relu", "--squared-relu", "squared relu = False"),
        ("--num-experts 2 2", "--num-experts 2 2", "num experts = [1]"),
        ("--ffn-hidden-size 100", "--ffn-hidden-size 100", "ffn hidden size = "),
    ],
)
def test_a_flag_against_the_variant(words, flag, decided):
    sentence = refusal("--ru-variant", "llama3_tiny", *words.split())
    assert sentence.startswith(f"{flag} contradicts --ru-variant llama3_tiny, which decides {decided}")
    assert sentence.endswith("; drop the flag or choose another variant")


def test_a_flag_that_says_the_same_is_no_contradiction():
    assert parsed("--ru-variant", "llama3_tiny", "--swiglu", "--num-key-value-heads", "4").swiglu is True


def test_what_the_host_cannot_build():
    assert refusal("--ru-variant", "gpt2_pos_every_layer") == (
        f"--ru-variant gpt2_pos_every_layer has {' and '.join(beyond_host(find_variant('gpt2_pos_every_layer')))}, "
        "which Megatron-DeepSpeed has no argument for; train it with megatron-ru pretrain_gpt, or choose another "
        "variant"
    )
    assert beyond_host(find_variant("gpt2_pos_every_layer"))[0] == "sinusoidal_every_layer positions"
    possible = [name for name, variant in all_variants().items() if not beyond_host(variant)]
    assert {"llama2_7b", "llama3_8b", "mistral_7b", "ru_7b3", "ru_29b", "rugpt3_13b"} <= set(possible)


def test_without_a_variant_nothing_changes():
    args = parsed("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "2", "--seq-length", "8")
    assert (args.attention_dropout, args.normalization, args.kv_channels) == (0.1, "layernorm", None)
    assert "did you mean" in refusal("--ru-variant", "llama3_tin")
    assert refusal("--ru-tie-embeddings").startswith("--ru-tie-embeddings refines a variant and there is none")
    assert refusal("--ru-variant", "llama3_tiny", "--ru-tie-embeddings", "--untie-embeddings-and-output-weights") == (
        "--untie-embeddings-and-output-weights contradicts --ru-tie-embeddings; drop one of the two flags"
    )
