import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.models import variants
from megatron_ru.models.variant import VARIANTS, Variant, all_variants, derive, find_variant, register

LADDER = [
    "gpt2",
    "gpt2_rope",
    "gpt2_rope_preln",
    "gpt2_rope_preln_rmsnorm",
    "gpt2_rope_preln_rmsnorm_swiglu",
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim",
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa",
]

# All that a step may change, and a word of its difference that says so.
STEPS = {
    "gpt2_rope": {"positions": ("sinusoidal", "rope", "RoPE")},
    "gpt2_rope_preln": {"norm_placement": ("post", "pre", "pre-norm")},
    "gpt2_rope_preln_rmsnorm": {
        "norm": ("layernorm", "rmsnorm", "RMSNorm"),
        "attention_dropout": (0.1, 0.0, "no dropout"),
        "hidden_dropout": (0.1, 0.0, "no dropout"),
    },
    "gpt2_rope_preln_rmsnorm_swiglu": {
        "activation": ("gelu", "swiglu", "SwiGLU"),
        "bias": (True, False, "without biases"),
    },
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim": {"mlp_ratio": (4.0, 3.5, "C = 3.5")},
    "gpt2_rope_preln_rmsnorm_swiglu_mlpdim_gqa": {"query_heads_per_kv_head": (1, 4, "four query heads")},
    "gpt2_pos_every_layer": {"positions": ("sinusoidal", "sinusoidal_every_layer", "before every attention")},
}


def small(**changes):
    sizes = {
        "name": "small", "difference": "a test's own", "num_layers": 2, "hidden_size": 64,
        "num_attention_heads": 8, "vocab_size": 100, "seq_length": 32,
    }  # fmt: skip
    return Variant(**{**sizes, **changes})


@pytest.mark.parametrize("name", STEPS)
def test_a_ladder_step_differs_from_its_parent_in_what_it_declares_and_nothing_else(name):
    step = find_variant(name)
    expected = {field: (old, new) for field, (old, new, _) in STEPS[name].items()}
    assert step.changes_from(find_variant(step.parent)) == expected
    for _, _, words in STEPS[name].values():
        assert words in step.difference


def test_the_ladder_is_a_chain_of_seven_files():
    assert [find_variant(name).parent for name in LADDER] == [None, *LADDER[:-1]]
    folder = Path(variants.__path__[0])
    for name in LADDER:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert sum(getattr(call.func, "id", "") == "register" for call in calls) == 1


def test_the_base_of_the_ladder():
    base = find_variant("gpt2")
    assert (base.vocab_size, base.hidden_size, base.ffn_hidden_size) == (50272, 2560, 10240)
    assert (base.num_attention_heads, base.num_layers, base.seq_length) == (20, 32, 4096)
    assert (base.positions, base.norm_placement, base.norm) == ("sinusoidal", "post", "layernorm")
    assert (base.activation, base.bias, base.attention_dropout, base.hidden_dropout) == (
        "gelu",
        True,
        0.1,
        0.1,
    )


def test_the_activation_table_is_six_activations_with_and_without_biases():
    parent = find_variant("gpt2_rope_preln_rmsnorm")
    rows = {name: v for name, v in all_variants().items() if name.startswith("activation_")}
    assert {(v.activation, v.bias) for v in rows.values()} == {
        (activation, bias)
        for activation in ("relu", "gelu", "swish", "reglu", "geglu", "swiglu")
        for bias in (True, False)
    }
    assert len(rows) == 12
    assert all(set(v.changes_from(parent)) <= {"activation", "bias"} for v in rows.values())
    assert {v.ffn_hidden_size for v in rows.values()} == {10240}
    assert rows["activation_geglu_nobias"].changes_from(parent) == {
        "activation": ("gelu", "geglu"),
        "bias": (True, False),
    }


def test_the_mlp_ratio_table():
    parent = find_variant("gpt2_rope_preln_rmsnorm_swiglu")
    rows = [v for name, v in all_variants().items() if name.startswith("mlp_ratio_")]
    # 8/3 of 2560 is 6826.67, to the nearest multiple of 8.
    assert sorted(v.ffn_hidden_size for v in rows) == [2560, 3840, 5120, 6824, 7680, 8960, 10240]
    assert all(set(v.changes_from(parent)) <= {"mlp_ratio"} for v in rows)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "ffn", "heads", "groups", "vocabulary", "context"),
    [
        ("ru_7b3", 32, 4096, 14336, 32, 8, 40000, 4096),
        ("ru_29b", 58, 6144, 21504, 64, 16, 40000, 4096),
        ("llama2_7b", 32, 4096, 11008, 32, 32, 32000, 4096),
        ("llama3_8b", 32, 4096, 14336, 32, 8, 128256, 8192),
        ("mistral_7b", 32, 4096, 14336, 32, 8, 32000, 4096),
        ("rugpt3_13b", 40, 5120, 20480, 40, 40, 50272, 2048),
        ("solar_10b7", 48, 4096, 14336, 32, 8, 32000, 4096),
    ],
)
def test_shapes_of_the_presets(name, layers, hidden, ffn, heads, groups, vocabulary, context):
    v = find_variant(name)
    assert (v.num_layers, v.hidden_size, v.ffn_hidden_size) == (layers, hidden, ffn)
    assert (v.num_attention_heads, v.num_query_groups) == (heads, groups)
    assert (v.vocab_size, v.seq_length) == (vocabulary, context)


def test_kinds_of_the_presets():
    llama3, rugpt = find_variant("llama3_8b"), find_variant("rugpt3_13b")
    assert llama3.rotary_base == 500000
    assert (llama3.positions, llama3.norm, llama3.activation, llama3.bias) == (
        "rope",
        "rmsnorm",
        "swiglu",
        False,
    )
    assert (rugpt.positions, rugpt.norm, rugpt.norm_placement) == ("learned", "layernorm", "pre")
    assert (rugpt.activation, rugpt.bias, rugpt.tied_embeddings) == ("gelu_tanh", True, True)
    assert find_variant("mistral_7b").sliding_window == 4096
    assert find_variant("solar_10b7").sliding_window is None


def test_recipe_of_ru_7b3_and_that_recipes_are_not_inherited():
    recipe = find_variant("ru_7b3").recipe
    assert recipe == {
        "optimizer": "adam", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "lr": 3e-4,
        "weight_decay": 0.1, "lr_decay_style": "cosine", "tokens": 2e12, "tokens_per_batch": 4e6,
    }  # fmt: skip
    assert find_variant("ru_demo").recipe == {}


@pytest.mark.parametrize(
    ("name", "tensor", "stages"),
    [("llama2_tiny", 4, 4), ("gpt2_tiny", 4, 4), ("llama3_tiny", 4, 4), ("ru_demo", 2, 4), ("ru_29b", 8, 2)],
)
def test_small_ones_divide_among_tensor_and_pipeline_ranks(name, tensor, stages):
    v = find_variant(name)
    assert v.num_attention_heads % tensor == v.num_query_groups % tensor == v.ffn_hidden_size % tensor == 0
    assert v.num_layers % stages == 0


def test_sizes_of_ru_29b_are_multiples_of_128():
    v = find_variant("ru_29b")
    widths = [v.hidden_size, v.ffn_hidden_size, v.head_size * v.num_query_groups]
    assert [width % 128 for width in widths] == [0, 0, 0]
    assert (v.num_layers + 2) % 12 == 0


@pytest.mark.parametrize("name", all_variants())
def test_every_variant_has_a_name_a_sentence_and_a_known_parent(name):
    v = all_variants()[name]
    assert v.name == name
    assert v.difference
    assert v.parent is None or v.parent in all_variants()


def test_derive_changes_only_what_is_named():
    child = derive(small(recipe={"lr": 1.0}), "child", "deeper", num_layers=5)
    assert (child.name, child.parent, child.difference, child.recipe) == ("child", "small", "deeper", {})
    assert child.changes_from(small()) == {"num_layers": (2, 5)}


def test_derive_refuses_a_field_that_does_not_exist():
    with pytest.raises(TypeError, match="num_layer"):
        derive(small(), "child", "a typing error", num_layer=5)


def test_a_variant_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().num_layers = 3


def test_a_file_in_the_package_adds_a_variant(tmp_path, monkeypatch):
    (tmp_path / "one_more.py").write_text(
        "from megatron_ru.models.variant import derive, register\n"
        "from megatron_ru.models.variants.gpt2 import gpt2\n"
        "register(derive(gpt2, 'one_more', 'a narrower one', hidden_size=640))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(VARIANTS, "_members", all_variants())
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(tmp_path)])
    try:
        VARIANTS.scan(variants)
        assert find_variant("one_more").ffn_hidden_size == 2560
    finally:
        sys.modules.pop(f"{variants.__name__}.one_more", None)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="two variants are named 'gpt2'"):
        register(small(name="gpt2"))


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(UserError, match=r"unknown variant 'llama_tiny'.*did you mean .*llama2_tiny.*known variants: "):
        find_variant("llama_tiny")


def test_a_hopeless_name_is_answered_with_all():
    with pytest.raises(UserError, match=r"unknown variant 'zzz'.*known variants: activation_geglu, .*solar_10b7"):
        find_variant("zzz")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"positions": "alibi"},
            "variant small: positions is 'alibi', expected one of sinusoidal, sinusoidal_",
        ),
        ({"norm": "batchnorm"}, "norm is 'batchnorm', expected one of layernorm, rmsnorm"),
        ({"norm_placement": "both"}, "norm_placement is 'both', expected one of pre, post"),
        ({"activation": "tanh"}, "activation is 'tanh', expected one of relu, gelu, gelu_tanh, swish, reglu"),
        ({"num_layers": 0}, "num_layers is 0, expected more than 0"),
        ({"vocab_size": -1}, "vocab_size is -1, expected more than 0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0, expected 0 <= hidden_dropout < 1"),
        ({"num_attention_heads": 7}, "hidden size 64 does not divide by 7 attention heads"),
        ({"query_heads_per_kv_head": 3}, "8 attention heads do not divide into groups of 3 query heads per"),
        ({"rotary_percent": 1.5}, "rotary_percent is 1.5, expected 0 < rotary_percent <= 1"),
        ({"kv_channels": 5}, "RoPE turns pairs of channels, but a head has 5 of them to turn"),
        (
            {"max_position_embeddings": 16},
            "a context of 32 tokens is longer than max_position_embeddings, 16",
        ),
        ({"sliding_window": 16}, "a context of 32 tokens is longer than its attention window of 16 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_told(changes, sentence):
    with pytest.raises(UserError) as caught:
        small(**changes)
    assert sentence in str(caught.value)


def test_derived_sizes():
    v = small(mlp_ratio=8 / 3, query_heads_per_kv_head=4)
    assert (v.ffn_hidden_size, v.head_size, v.num_query_groups) == (168, 8, 2)
    assert small(kv_channels=16).head_size == 16
    assert small(mlp_ratio=0.001).ffn_hidden_size == 8
    assert (small().gated, small(activation="gelu").gated) == (True, False)
    assert (small().final_norm, small(norm_placement="post").final_norm) == (True, False)


def test_variants_and_their_arguments_import_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['megatron'] = None\n"
        "import megatron_ru.models.variant_arguments, megatron_ru.models.parameter_count\n"
        "from megatron_ru.models.variant import all_variants; print(len(all_variants()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(all_variants())
