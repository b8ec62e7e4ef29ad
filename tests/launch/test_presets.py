import argparse

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.presets import PRESETS, flag_value, parallel_size

COMMAND = ("megatron-ru", "pretrain_gpt", "--ru-variant", "rugpt3_13b")


def test_13b_on_v100():
    command = PRESETS["13b_v100"].applied_to(COMMAND)
    assert command == (
        *COMMAND, "--micro-batch-size", "1", "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "8",
        "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
    )  # fmt: skip


def test_flags_of_presets_are_megatrons():
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for _, preset in PRESETS.items():
        words = preset.applied_to(())
        assert argparse.ArgumentParser.parse_known_args(parser, list(words))[1] == []


def test_what_the_command_says_already_stays():
    command = (*COMMAND, "--micro-batch-size=1")
    assert PRESETS["13b_v100"].applied_to(command)[: len(command) + 1] == (*command, "--tensor-model-parallel-size")


def test_contradiction():
    with pytest.raises(
        UserError, match="the command says --micro-batch-size 2, preset 13b_v100 --micro-batch-size 1: drop"
    ):
        PRESETS["13b_v100"].applied_to((*COMMAND, "--micro-batch-size", "2"))


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown preset '13b'; known presets: 13b_v100"):
        PRESETS["13b"]


def test_values_as_argparse_takes_them():
    assert flag_value(("a", "--x", "1", "--x=2"), "--x") == "2"
    assert flag_value(("a", "--x"), "--x") == ""
    assert flag_value(("a", "--xy", "1"), "--x") is None
    assert [parallel_size(words, "--x") for words in ((), ("--x", "8"), ("--x", "many"))] == [1, 8, 1]
