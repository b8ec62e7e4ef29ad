import argparse
import functools

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.variant import all_variants, find_variant
from megatron_ru.models.variant_arguments import (
    beyond_megatron,
    check_divisibility,
    command_line,
    extend_parser,
    megatron_arguments,
    refine,
    variant_of,
)


@functools.cache
def megatron_parser():
    arguments = pytest.importorskip("megatron.training.arguments")
    return extend_parser(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse(line):
    return megatron_parser().parse_args(line.split())


def refusal(line):
    with pytest.raises(UserError) as caught:
        parse(line)
    return str(caught.value)


@pytest.mark.parametrize("name", all_variants())
def test_every_variant_parses_to_its_own_arguments(name):
    variant, args = find_variant(name), parse(f"--ru-variant {name}")
    assert args.ru_variant == name
    for dest, value in megatron_arguments(variant).items():
        assert getattr(args, dest) == value, dest
    assert variant_of(args).changes_from(variant).keys() <= {"max_position_embeddings"}


def test_megatron_arguments_of_the_final_model():
    args = parse("--ru-variant ru_7b3")
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (32, 4096, 14336)
    assert (args.num_attention_heads, args.group_query_attention, args.num_query_groups) == (32, True, 8)
    assert (args.kv_channels, args.seq_length, args.max_position_embeddings) == (128, 4096, 4096)
    assert (args.position_embedding_type, args.rotary_base, args.rotary_percent) == ("rope", 10000, 1.0)
    assert (args.normalization, args.layernorm_epsilon) == ("RMSNorm", 1e-5)
    assert (args.swiglu, args.add_bias_linear, args.add_qkv_bias) == (True, False, False)
    assert args.untie_embeddings_and_output_weights is True
    assert (args.attention_dropout, args.hidden_dropout) == (0.0, 0.0)


def test_megatron_arguments_of_the_base_and_of_learned_positions():
    base, rugpt = parse("--ru-variant gpt2"), parse("--ru-variant rugpt3_13b")
    assert (base.position_embedding_type, base.normalization) == ("learned_absolute", "LayerNorm")
    assert (base.swiglu, base.add_bias_linear, base.attention_dropout) == (False, True, 0.1)
    # Megatron's fused bias and GELU is the tanh form, and GPT-2's is not that of the base.
    assert (base.bias_gelu_fusion, rugpt.bias_gelu_fusion) == (False, True)
    assert rugpt.position_embedding_type == "learned_absolute"
    assert rugpt.untie_embeddings_and_output_weights is False


@pytest.mark.parametrize(("name", "fused"), [("activation_swiglu", True), ("activation_geglu", False)])
def test_gated_activations_count_as_swiglu_but_only_swiglu_is_fused(name, fused):
    args = parse(f"--ru-variant {name}")
    assert (args.swiglu, args.bias_swiglu_fusion) == (True, fused)


def test_without_a_variant_the_parser_is_megatrons_own():
    args = parse("--num-layers 3")
    assert (args.ru_variant, args.num_layers, args.hidden_size, args.swiglu) == (None, 3, None, False)
    assert args.normalization == "LayerNorm"
    assert variant_of(args) is None


def test_sizes_refine_and_widths_follow():
    args = parse("--ru-variant ru_7b3 --num-layers 8 --hidden-size=2048 --num-attention-heads 16")
    assert (args.num_layers, args.ffn_hidden_size, args.num_query_groups, args.kv_channels) == (
        8,
        7168,
        4,
        128,
    )
    refined = variant_of(args)
    assert (refined.num_layers, refined.hidden_size, refined.name) == (8, 2048, "ru_7b3")


def test_an_irregular_width_stays_exact_at_its_own_hidden_size():
    assert parse("--ru-variant llama2_7b").ffn_hidden_size == 11008
    # 11008/4096 of 2560 is 6880.
    assert parse("--ru-variant llama2_7b --hidden-size 2560").ffn_hidden_size == 6880


def test_dropout_epsilon_base_and_context_refine():
    args = parse(
        "--ru-variant gpt2_rope --attention-dropout 0 --hidden-dropout 0.2 --norm-epsilon 1e-6 "
        "--rotary-base 500000 --seq-length 8192"
    )
    assert (args.attention_dropout, args.hidden_dropout, args.layernorm_epsilon) == (0.0, 0.2, 1e-6)
    assert (args.rotary_base, args.seq_length, args.max_position_embeddings) == (500000, 8192, 8192)


def test_a_table_of_learned_positions_keeps_its_rows_in_a_shorter_context():
    args = parse("--ru-variant rugpt3_13b --seq-length 512")
    assert (args.seq_length, args.max_position_embeddings) == (512, 2048)
    assert variant_of(args).position_count == 2048


def test_tying_refines_both_ways():
    untie = "untie_embeddings_and_output_weights"
    assert getattr(parse("--ru-variant ru_7b3 --ru-tie-embeddings"), untie) is False
    assert getattr(parse("--ru-variant gpt2 --no-ru-tie-embeddings"), untie) is True
    args = parse("--ru-variant gpt2 --untie-embeddings-and-output-weights")
    assert getattr(args, untie) is True
    assert variant_of(args).tied_embeddings is False
    assert refusal("--ru-variant gpt2 --untie-embeddings-and-output-weights --ru-tie-embeddings") == (
        "--untie-embeddings-and-output-weights contradicts --ru-tie-embeddings; drop one of the two flags"
    )
    assert "--ru-tie-embeddings refines a variant and there is none" in refusal("--ru-tie-embeddings")


@pytest.mark.parametrize(
    "flags",
    [
        "--ffn-hidden-size 11008 --normalization RMSNorm --swiglu --disable-bias-linear --kv-channels 128",
        "--position-embedding-type rope --use-rotary-position-embeddings --no-position-embedding",
        "--group-query-attention --num-query-groups 32",
        "--num-query-groups=32 --rotary-percent 1.0",
        "--untie-embeddings-and-output-weights --no-bias-swiglu-fusion --use-rope-scaling",
    ],
)
def test_explicit_flags_that_agree_are_fine(flags):
    assert parse(f"--ru-variant llama2_7b {flags}").hidden_size == 4096


@pytest.mark.parametrize(
    ("line", "flag", "decision"),
    [
        ("ru_7b3 --normalization LayerNorm", "--normalization LayerNorm", "RMSNorm"),
        ("ru_7b3 --normalization=LayerNorm", "--normalization LayerNorm", "RMSNorm"),
        ("gpt2 --normalization RMSNorm", "--normalization RMSNorm", "LayerNorm"),
        ("gpt2 --swiglu", "--swiglu", "the activation gelu"),
        ("ru_7b3 --squared-relu", "--squared-relu", "the activation swiglu"),
        ("ru_7b3 --quick-geglu", "--quick-geglu", "the activation swiglu"),
        ("gpt2 --disable-bias-linear", "--disable-bias-linear", "linear layers with biases"),
        ("ru_7b3 --add-qkv-bias", "--add-qkv-bias", "linear layers without biases"),
        (
            "ru_7b3 --position-embedding-type learned_absolute",
            "--position-embedding-type learned_absolute",
            "rope positions",
        ),
        ("gpt2 --position-embedding-type rope", "--position-embedding-type rope", "sinusoidal positions"),
        ("gpt2 --use-rotary-position-embeddings", "--use-rotary-position-embeddings", "sinusoidal positions"),
        ("gpt2 --rotary-base 5", "--rotary-base 5", "sinusoidal positions"),
        ("ru_7b3 --rotary-percent 0.5", "--rotary-percent 0.5", "1.0"),
        ("ru_7b3 --kv-channels 64", "--kv-channels 64", "128"),
        (
            "ru_7b3 --hidden-size 2048 --ffn-hidden-size 14336",
            "--ffn-hidden-size 14336",
            "7168 (C = 3.5 times hidden size 2048)",
        ),
        ("ru_7b3 --num-query-groups 4", "--num-query-groups 4", "8 (32 heads, 4 query heads each)"),
        (
            "llama2_7b --group-query-attention",
            "--group-query-attention",
            "32 query groups (1 query heads each)",
        ),
        ("ru_7b3 --encoder-num-layers 5", "--encoder-num-layers 5", "a decoder of 32 layers (refine it with"),
        ("ru_7b3 --num-experts 4", "--num-experts 4", "an architecture without it"),
        (
            "gpt2 --apply-residual-connection-post-layernorm",
            "--apply-residual-connection-post-layernorm",
            "post-norm",
        ),
        ("ru_7b3 --yaml-cfg x.yaml", "--yaml-cfg x.yaml", "the model that the file would replace"),
    ],
)
def test_an_explicit_flag_that_contradicts_is_an_error_that_names_both(line, flag, decision):
    name = line.split()[0]
    sentence = refusal(f"--ru-variant {line}")
    assert sentence.startswith(f"{flag} contradicts --ru-variant {name}, which decides {decision}")
    assert sentence.endswith("; drop the flag or choose another variant")


def test_refinements_that_do_not_fit_together_are_told():
    assert refusal("--ru-variant ru_7b3 --num-attention-heads 30") == (
        "variant ru_7b3: hidden size 4096 does not divide by 30 attention heads"
    )
    assert "2 attention heads do not divide into groups of 4" in refusal("--ru-variant ru_7b3 --num-attention-heads 2")
    assert "longer than its attention window of 4096 tokens" in refusal("--ru-variant mistral_7b --seq-length 8192")
    assert "a context of 4096 tokens is longer than max_position_embeddings, 1024" in refusal(
        "--ru-variant ru_7b3 --max-position-embeddings 1024"
    )
    assert "did you mean ru_7b3" in refusal("--ru-variant ru_7b")


def test_the_vocabulary_is_for_null_tokenizers_only():
    assert parse("--ru-variant ru_7b3").vocab_size == 40000
    assert parse("--ru-variant ru_7b3 --tokenizer-type NullTokenizer").vocab_size == 40000
    assert parse("--ru-variant ru_7b3 --tokenizer-type NullTokenizer --vocab-size 7").vocab_size == 7
    assert parse("--ru-variant ru_7b3 --tokenizer-type HuggingFaceTokenizer").vocab_size is None
    assert parse("--ru-variant ru_7b3 --tokenizer-type TikTokenizer").vocab_size is None


def test_a_null_tokenizer_that_counts_its_end_of_document_apart_is_told_one_token_less():
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--tokenizer-type")
    assert extend_parser(parser).parse_args(["--ru-variant", "ru_7b3"]).vocab_size == 39999


def test_a_recipe_gives_soft_defaults():
    args = parse("--ru-variant ru_7b3")
    assert (args.lr, args.adam_beta2, args.weight_decay, args.lr_decay_style) == (3e-4, 0.95, 0.1, "cosine")
    args = parse("--ru-variant ru_7b3 --lr 1 --lr-decay-style linear")
    assert (args.lr, args.lr_decay_style, args.adam_beta2) == (1.0, "linear", 0.95)
    assert args.global_batch_size is None


def test_a_plain_parser_gets_only_the_destinations_it_has():
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-layers", "-L", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, required=False)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--no-swiglu", action="store_false", dest="swiglu")
    parser.add_argument("words", nargs="*")
    assert extend_parser(parser) is parser
    args = parser.parse_args(["a", "b", "--ru-variant=llama2_tiny"])
    assert vars(args) == {
        "num_layers": 4, "hidden_size": 128, "swiglu": True, "words": ["a", "b"],
        "ru_variant": "llama2_tiny", "ru_tie_embeddings": None,
    }  # fmt: skip
    # An alias is explicit as well, even where it repeats the parser's default.
    assert parser.parse_args(["--ru-variant", "llama2_tiny", "-L", "1"]).num_layers == 1
    with pytest.raises(UserError, match="--no-swiglu contradicts --ru-variant llama2_tiny, which decides the act"):
        parser.parse_args(["--ru-variant", "llama2_tiny", "--no-swiglu"])


def test_unknown_words_and_a_given_namespace_pass_through():
    parser = extend_parser(argparse.ArgumentParser())
    parser.add_argument("--num-layers", type=int)
    given = argparse.Namespace(num_layers=7, other="kept")
    args, rest = parser.parse_known_args(["--ru-variant", "llama2_tiny", "--what", "1"], given)
    assert (args.num_layers, args.other, rest) == (7, "kept", ["--what", "1"])
    assert parser.parse_args([]).num_layers is None


def test_refine_by_hand():
    refined = refine(find_variant("llama3_tiny"), {"hidden_size": 256, "num_attention_heads": 4})
    assert (refined.ffn_hidden_size, refined.num_query_groups, refined.head_size) == (896, 2, 64)


@pytest.mark.parametrize("name", [name for name, v in all_variants().items() if not beyond_megatron(v)])
def test_the_printed_flags_stand_for_the_variant(name):
    by_name = vars(parse(f"--ru-variant {name}"))
    by_flags = vars(megatron_parser().parse_args(command_line(find_variant(name))))
    # A recipe is no part of the architecture; validation sets add_qkv_bias with add_bias_linear.
    aside = {"ru_variant", "add_qkv_bias", *find_variant(name).recipe}
    assert {key for key, value in by_name.items() if by_flags[key] != value} <= aside


def test_what_stock_flags_cannot_say():
    assert beyond_megatron(find_variant("gpt2")) == ["sinusoidal positions", "post-norm"]
    assert beyond_megatron(find_variant("activation_reglu")) == ["activation reglu"]
    assert beyond_megatron(find_variant("ru_7b3")) == []


def sizes(**changes):
    fields = {
        "hidden_size": 128, "num_attention_heads": 8, "num_layers": 8, "seq_length": 256,
        "ffn_hidden_size": 352,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "micro_batch_size": 2, "global_batch_size": 8, "kv_channels": None,
    }  # fmt: skip
    return argparse.Namespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "world", "sentence"),
    [
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            6,
            "6 processes do not divide into model replicas of TP 2 x PP 2 x CP 1 = 4; start a multiple of 4",
        ),
        (
            {"global_batch_size": 6},
            2,
            "--global-batch-size 6 does not divide by micro-batch size 2 x data parallel size 2 = 4",
        ),
        ({"micro_batch_size": 0}, 1, "--micro-batch-size is 0, expected at least 1"),
        (
            {"num_layers": 6, "pipeline_model_parallel_size": 4},
            4,
            "--num-layers 6 does not divide by pipeline parallel size 4; change one of them",
        ),
        (
            {"num_layers": 8, "pipeline_model_parallel_size": 4, "account_for_loss_in_pipeline_split": True},
            4,
            "--num-layers 8 + 1 for the output does not divide by pipeline parallel size 4",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
            2,
            "4 layers per pipeline stage does not divide by --num-layers-per-virtual-pipeline-stage 3",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3},
            2,
            "4 layers per pipeline stage does not divide by --num-virtual-stages-per-pipeline-rank 3",
        ),
        ({"num_attention_heads": 7}, 1, "--hidden-size 128 does not divide by 7 attention heads"),
        (
            {"group_query_attention": True, "num_query_groups": 3},
            1,
            "--num-attention-heads 8 does not divide by 3 query groups",
        ),
        (
            {"tensor_model_parallel_size": 3, "global_batch_size": 2},
            3,
            "--num-attention-heads 8 does not divide by tensor parallel size 3",
        ),
        (
            {
                "num_attention_heads": 12, "hidden_size": 96, "group_query_attention": True,
                "num_query_groups": 6, "tensor_model_parallel_size": 4, "kv_channels": 8,
            },
            4,
            "6 query groups are neither a multiple nor a divisor of tensor parallel size 4",
        ),
        (
            {"tensor_model_parallel_size": 4, "ffn_hidden_size": 350},
            4,
            "feed-forward width 350 does not divide by tensor parallel size 4",
        ),
        (
            {"tensor_model_parallel_size": 4, "seq_length": 250, "sequence_parallel": True},
            4,
            "--seq-length 250 does not divide by sequence parallel over TP 4 x CP 1 = 4",
        ),
        ({"context_parallel_size": 4, "seq_length": 100}, 4, "--seq-length 100 does not divide by 2 x con"),
        ({"num_layers": None}, 1, "--num-layers is missing; give it, or choose an architecture with"),
        ({"tensor_model_parallel_size": 0}, 1, "--tensor-model-parallel-size is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_indivisible_sizes_are_told_in_one_sentence(changes, world, sentence):
    with pytest.raises(UserError) as caught:
        check_divisibility(sizes(**changes), world)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({}, 4),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 2}, 8),
        ({"num_layers": 6, "pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 1}, 4),
        (
            {
                "num_layers": 6, "pipeline_model_parallel_size": 4,
                "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True,
            },
            4,
        ),
        # More tensor ranks than query groups: Megatron gives several ranks the same group.
        ({"group_query_attention": True, "num_query_groups": 2, "tensor_model_parallel_size": 4}, 4),
        ({"global_batch_size": None}, 3),
    ],
)  # fmt: skip
def test_divisible_sizes_pass(changes, world):
    check_divisibility(sizes(**changes), world)


def test_the_tiny_variants_pass_at_every_layout_of_the_parity_runs():
    for name in ("llama2_tiny", "llama3_tiny", "gpt2_tiny", "ru_demo"):
        for tensor, stages in ((1, 1), (2, 1), (1, 2), (2, 2), (2, 4)):
            args = parse(
                f"--ru-variant {name} --micro-batch-size 1 --global-batch-size 4 --sequence-parallel "
                f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {stages}"
            )
            check_divisibility(args, tensor * stages)
