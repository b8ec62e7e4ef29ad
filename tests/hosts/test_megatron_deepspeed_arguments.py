"""Our flags and defaults in the host's parser, and what is refused."""

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts.megatron_deepspeed_arguments import extend_parser
from tests.hosts.deepspeed_parser import host_parser

SIZES = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"]


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")


def parsed(*words):
    seen = []
    args = extend_parser(host_parser(), seen.append).parse_args([*SIZES, *words])
    assert seen == [args], "called once, with what is returned"
    return args


def refusal(*words):
    with pytest.raises(UserError) as error:
        extend_parser(host_parser(), lambda args: pytest.fail("parsed")).parse_args([*SIZES, *words])
    return str(error.value)


def test_defaults_that_are_true_of_a_cpu():
    args = parsed()
    found = (args.masked_softmax_fusion, args.gradient_accumulation_fusion, args.num_workers, args.distributed_backend)
    assert found == (False, False, 0, "gloo")
    assert (args.ru_ops, args.ru_init, args.ru_host_repairs, args.ru_metrics) == ("all", "whole", "all", None)
    assert parsed("--num-workers", "3").num_workers == 3


def test_a_gpu_keeps_its_softmax(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    args = parsed()
    assert (args.masked_softmax_fusion, args.num_workers, args.distributed_backend) == (True, 2, "nccl")


@pytest.mark.parametrize(("tp", "multiple"), [("1", 128), ("2", 64), ("4", 32)])
def test_the_padded_vocabulary_is_the_same_for_every_tp(monkeypatch, tp, multiple):
    monkeypatch.setenv("WORLD_SIZE", tp)
    assert parsed("--tensor-model-parallel-size", tp).make_vocab_size_divisible_by == multiple
    chosen = parsed("--tensor-model-parallel-size", tp, "--make-vocab-size-divisible-by", "8")
    assert chosen.make_vocab_size_divisible_by == 8


def test_the_kind_of_tokenizer_is_told_from_its_path(tmp_path):
    assert parsed("--tokenizer-model", "ru.model").tokenizer_type == "GPTSentencePieceTokenizer"
    assert parsed("--tokenizer-model", str(tmp_path)).tokenizer_type == "HFTokenizer"
    assert parsed("--tokenizer-model", "x", "--tokenizer-type", "HFTokenizer").tokenizer_type == "HFTokenizer"
    assert parsed().tokenizer_type is None
    assert refusal("--tokenizer-model", "ru.txt").startswith("--tokenizer-model ru.txt is neither a sentencepiece")


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--ru-nan-grads", "zero"], "--ru-nan-grads"),
        (["--ru-checkpoints", "safe", "--ru-keep", "2"], "--ru-checkpoints, --ru-keep"),
        (["--ru-validate-from-start"], "--ru-validate-from-start"),
    ],
)
def test_flags_of_ours_that_this_host_does_not_carry_out(words, flags):
    assert refusal(*words) == (
        f"{flags} is not carried out inside Megatron-DeepSpeed, whose loop and engine are its own; drop it, or train "
        "with megatron-ru pretrain_gpt"
    )


def test_sizes_that_do_not_fit(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = ["--tensor-model-parallel-size", "4"]
    assert parsed(*words).num_key_value_heads == 4
    assert refusal(*words, "--num-key-value-heads", "2") == (
        "--num-key-value-heads 2 does not divide by tensor parallel size 4, and Megatron-DeepSpeed gives each rank "
        "whole key-value heads; change one of them"
    )
    assert (
        refusal("--num-key-value-heads", "3")
        == "--num-attention-heads 4 does not divide by 3 query groups; change one of them"
    )
    assert refusal("--pipeline-model-parallel-size", "3").startswith("4 processes do not divide into model replicas")
    with pytest.raises(UserError, match="missing: --num-layers N, --hidden-size N and --num-attention-heads N"):
        extend_parser(host_parser(), print).parse_args(["--num-layers", "4"])
