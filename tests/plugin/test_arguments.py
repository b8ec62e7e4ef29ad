"""Our flags in Megatron's real parser."""

import argparse
import sys

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.arguments import HOST_SPEC, device_of, extend_parser

SIZES = ["--ru-variant", "llama2_tiny", "--micro-batch-size", "2"]


@pytest.fixture(autouse=True)
def one_process_environment(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def parser():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def parse(*words, monkeypatch, when_parsed=None):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *SIZES, *words])
    return extend_parser(parser(), when_parsed).parse_args()


def test_defaults_are_true_of_a_machine_without_apex(monkeypatch):
    args = parse(monkeypatch=monkeypatch)
    assert args.spec == HOST_SPEC
    assert args.transformer_impl == "local"
    assert args.gradient_accumulation_fusion is True
    assert parse("--no-gradient-accumulation-fusion", monkeypatch=monkeypatch).gradient_accumulation_fusion is False
    assert args.masked_softmax_fusion is False
    assert args.apply_rope_fusion is False
    assert args.create_attention_mask_in_dataloader is False
    assert (args.device, args.ru_metrics, args.ru_init, args.ru_ops) == ("auto", None, "whole", "all")
    # Off the CPU layer the backend is Megatron's business.
    plain = vars(parser().parse_args([]))
    assert args.distributed_backend == plain["distributed_backend"]
    assert args.num_workers == plain["num_workers"]


def test_what_is_typed_wins(monkeypatch):
    words = ["--spec", "my.specs", "LAYER", "--make-vocab-size-divisible-by", "64", "--num-workers", "3",
             "--ru-init", "megatron", "--ru-metrics", "m.jsonl", "--device", "cpu",
             "--ru-ops", "rope,adamw"]  # fmt: skip
    args = parse(*words, monkeypatch=monkeypatch)
    assert args.spec == ["my.specs", "LAYER"]
    assert args.make_vocab_size_divisible_by == 64
    assert args.num_workers == 3
    assert (args.device, args.ru_metrics, args.ru_init) == ("cpu", "m.jsonl", "megatron")
    assert args.ru_ops == "rope,adamw"


@pytest.mark.parametrize("spelling", [["--transformer-impl", "transformer_engine"],
                                      ["--transformer-impl=transformer_engine"]])  # fmt: skip
def test_transformer_engine_keeps_megatron_s_defaults(monkeypatch, spelling):
    args = parse(*spelling, monkeypatch=monkeypatch)
    plain = parser().parse_args(spelling)
    assert args.transformer_impl == "transformer_engine"
    for name in ("spec", "gradient_accumulation_fusion", "apply_rope_fusion", "make_vocab_size_divisible_by"):
        assert getattr(args, name) == getattr(plain, name), name


@pytest.mark.parametrize(("size", "divisor"), [(1, 128), (2, 64), (4, 32)])
def test_the_padded_vocabulary_is_the_same_for_every_layout(monkeypatch, size, divisor):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    args = parse("--tensor-model-parallel-size", str(size), monkeypatch=monkeypatch)
    assert args.make_vocab_size_divisible_by == divisor
    assert args.make_vocab_size_divisible_by * size == 128


def test_attention_masks_are_made_when_documents_are_kept_apart(monkeypatch):
    args = parse("--reset-attention-mask", monkeypatch=monkeypatch)
    assert args.create_attention_mask_in_dataloader is True


def test_on_the_cpu_layer(monkeypatch, cpu_device):
    args = parse(monkeypatch=monkeypatch)
    assert (args.distributed_backend, args.num_workers) == ("gloo", 0)
    assert parse("--num-workers", "2", monkeypatch=monkeypatch).num_workers == 2
    with pytest.raises(UserError) as error:
        parse("--distributed-backend", "nccl", monkeypatch=monkeypatch)
    assert str(error.value) == (
        "--distributed-backend nccl needs GPUs, but this run is on the CPU; drop the flag, or use gloo"
    )


def test_extending_twice_is_extending_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *SIZES])
    seen = []
    once = extend_parser(parser(), seen.append)
    actions = len(once._actions)
    assert extend_parser(once, lambda args: seen.append("again")) is once
    assert len(once._actions) == actions
    args = once.parse_args()
    assert seen == [args]


def test_what_follows_parsing_sees_finished_arguments(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    args = parse(
        "--tensor-model-parallel-size", "2", monkeypatch=monkeypatch,
        when_parsed=lambda args: seen.append((args.num_layers, args.make_vocab_size_divisible_by)),
    )  # fmt: skip
    assert seen == [(4, 64)]
    assert args.hidden_size == 128


def test_sizes_that_do_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes do not divide into model replicas of TP 2"):
        parse("--tensor-model-parallel-size", "2", monkeypatch=monkeypatch)


def test_unknown_device_is_argparse_s_error(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        parse("--device", "tpu", monkeypatch=monkeypatch)
    assert error.value.code == 2
    assert "argument --device: invalid choice: 'tpu'" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_device_of_the_words(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    machine = "cuda" if gpu else "cpu"
    assert device_of([]) == device_of(["--device", "auto"]) == device_of(["--lr", "1"]) == machine
    assert device_of(["--device", "cpu"]) == device_of(["--device=cpu"]) == "cpu"
    # As argparse does, the last one counts.
    assert device_of(["--device", "cpu", "--device=auto"]) == machine
    assert device_of(["--device"]) == machine
    if gpu:
        assert device_of(["--device", "cuda"]) == "cuda"
    else:
        with pytest.raises(UserError) as error:
            device_of(["--device", "cuda"])
        assert str(error.value) == (
            "--device cuda was given, but torch sees no CUDA device; check nvidia-smi, or use --device cpu"
        )


def test_the_cpu_layer_is_no_gpu(cpu_device):
    assert torch.cuda.is_available()
    assert device_of([]) == "cpu"
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        device_of(["--device", "cuda"])


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--tokenizer-model", "a.model"], "SentencePieceTokenizer"),
        (["--tokenizer-model", "dir/tokenizer.json"], "HuggingFaceTokenizer"),
        (["--tokenizer-model", "a.json", "--tokenizer-type", "TikTokenizer"], "TikTokenizer"),
        (["--mock-data"], "NullTokenizer"),
        ([], None),
    ],
)
def test_tokenizer_type_follows_the_file(monkeypatch, words, kind):
    assert parse(*words, monkeypatch=monkeypatch).tokenizer_type == kind


def test_tokenizer_of_no_kind(monkeypatch):
    with pytest.raises(
        UserError, match=r"^--tokenizer-model a.bin is neither a sentencepiece .model, a tokenizer.json"
    ):
        parse("--tokenizer-model", "a.bin", monkeypatch=monkeypatch)


def test_help_of_the_wheel_can_be_printed(capsys):
    extend_parser(parser()).print_help()
    text = capsys.readouterr().out
    assert "--ru-variant NAME" in text
    assert "--tensor-model-parallel-size" in text


def test_a_per_cent_sign_in_somebody_s_help_is_kept(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", default=3, help="sampled (50%) of them, default %(default)s")
    parser.add_argument("--size", default=3, help="default %(default)s")
    extend_parser(parser).print_help()
    text = capsys.readouterr().out
    assert "(50%)" in text
    assert "default 3" in text
