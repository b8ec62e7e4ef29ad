"""Entering a Megatron-DeepSpeed script, as far as it can be seen without one."""

import argparse
import os
import sys
from types import ModuleType

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts import megatron_deepspeed, megatron_deepspeed_stand_ins
from megatron_ru.hosts.megatron_deepspeed import enter, run_host


def test_no_script(tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    with pytest.raises(UserError) as error:
        run_host(str(script), [])
    assert str(error.value) == f"{script} is not a file, expected the pretrain_gpt.py of a Megatron-DeepSpeed checkout"


def test_the_script_runs_as_python_would_run_it(tmp_path, monkeypatch):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("import sys\nsys.seen = (__name__, __file__, sys.argv, sys.path[0])\n")
    entered = []
    monkeypatch.setattr(megatron_deepspeed, "enter", entered.append)
    monkeypatch.setattr(sys, "argv", ["megatron-ru", "run_host"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "seen", None, raising=False)
    run_host(str(script), ["--lr", "1"])
    assert entered == [["--lr", "1"]]
    assert sys.seen == ("__main__", str(script), [str(script), "--lr", "1"], str(tmp_path))


@pytest.fixture
def entering(monkeypatch):
    """The calls that `enter` makes outside this process's own state; the environment is as it was afterwards."""
    calls = []
    before = dict(os.environ)
    monkeypatch.setattr(megatron_deepspeed, "_entered", False)
    monkeypatch.setattr(megatron_deepspeed, "end_on_failure", lambda: None)
    monkeypatch.setattr(megatron_deepspeed, "meet_ranks", lambda: calls.append("ranks"))
    monkeypatch.setattr(megatron_deepspeed, "require", lambda *words: calls.append(words[0]))
    monkeypatch.setattr(megatron_deepspeed, "find_spec", lambda name: name)
    monkeypatch.setattr(megatron_deepspeed, "when_imported", lambda name, act: calls.append((name, act)))
    monkeypatch.setattr(megatron_deepspeed_stand_ins, "stand_in_for_missing_modules", lambda: calls.append("stand-ins"))
    for name in ("DS_ACCELERATOR", "LOCAL_SIZE"):
        os.environ.pop(name, None)
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    yield calls
    os.environ.clear()
    os.environ.update(before)


def test_ranks_first_then_deepspeed_s_accelerator_then_the_wait(entering):
    from megatron_ru.seams.cpu_device import CPU_DEVICE

    enter(["--device", "cpu"])
    waiting = ("megatron.initialize", megatron_deepspeed._extend_arguments)
    assert entering == ["ranks", "stand-ins", waiting]
    assert {name: os.environ[name] for name in ("DS_ACCELERATOR", "LOCAL_SIZE")} == {
        "DS_ACCELERATOR": "cpu",
        # Devices of this host: the host of the script takes the rank modulo this for the device.
        "LOCAL_SIZE": "3",
    }
    assert not CPU_DEVICE.installed
    enter(["--device", "cpu"])
    assert len(entering) == 3, "entered twice"


def test_without_deepspeed_there_is_nothing_to_run(entering, monkeypatch):
    monkeypatch.setattr(megatron_deepspeed, "find_spec", lambda name: None)
    enter(["--device", "cpu"])
    assert entering[:3] == ["ranks", "deepspeed", "transformers"], "the host imports both"


def test_deepspeed_s_launcher_places_its_ranks(entering):
    """It says how many there are on this host in a word of its own."""
    del os.environ["LOCAL_WORLD_SIZE"]
    os.environ |= {"RANK": "1", "LOCAL_SIZE": "4"}
    enter(["--device", "cpu"])
    assert os.environ["LOCAL_WORLD_SIZE"] == os.environ["LOCAL_SIZE"] == "4"


def test_an_accelerator_that_was_chosen_stays(entering, monkeypatch):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    enter([])
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_SIZE"]) == ("cpu", "2")


def test_a_gpu_wants_apex(entering, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(megatron_deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="imports NVIDIA's Apex on a GPU, and it is not installed"):
        enter(["--device", "cuda"])
    assert "DS_ACCELERATOR" not in os.environ


def host_initialize(monkeypatch, parse_args, validate_args=lambda args: args):
    module = ModuleType("host_initialize_for_test")
    module.parse_args, module.validate_args = parse_args, validate_args
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_our_flags_come_behind_those_of_the_script(monkeypatch):
    seen = {}

    def parse_args(extra_args_provider=None, ignore_unknown_args=False):
        parser = argparse.ArgumentParser()
        for dest in ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "seq_length"):
            parser.add_argument(f"--{dest}", type=int, default=4)
        parser.add_argument("--tensor_model_parallel_size", type=int, default=1)
        parser.add_argument("--tokenizer_type", default="NullTokenizer")
        seen["flags"] = [flag for action in extra_args_provider(parser)._actions for flag in action.option_strings]
        seen["ignore"] = ignore_unknown_args
        return parser.parse_args(["--num_layers", "2", "--script", "7"])

    monkeypatch.setattr(megatron_deepspeed, "_when_parsed", lambda args: seen.update(args=args))
    module = host_initialize(monkeypatch, parse_args)
    megatron_deepspeed._extend_arguments(module)

    def provider(parser):
        parser.add_argument("--script", type=int)
        return parser

    args = module.parse_args(provider, True)
    flags = seen["flags"]
    assert flags.index("--num_layers") < flags.index("--script") < flags.index("--ru-variant")
    assert flags.index("--ru-variant") < flags.index("--ru-host-repairs")
    assert (args.num_layers, args.script, args.ru_ops, args.ru_host_repairs) == (2, 7, "all", "all")
    assert seen["ignore"] is True
    assert seen["args"] is args


def test_an_assertion_about_arguments_becomes_a_sentence(monkeypatch):
    def validate_args(args, defaults=None):
        if args.save is not None:
            raise AssertionError("no folder please")
        return defaults

    module = host_initialize(monkeypatch, lambda extra_args_provider=None: None, validate_args)
    megatron_deepspeed._extend_arguments(module)
    assert module.validate_args(argparse.Namespace(save=None), {"a": 1}) == {"a": 1}
    with pytest.raises(UserError) as error:
        module.validate_args(argparse.Namespace(save="here"))
    assert str(error.value) == "Megatron refuses these arguments: no folder please"


def test_a_parser_function_that_moved_is_named(monkeypatch):
    module = host_initialize(monkeypatch, lambda provider: None)
    with pytest.raises(UserError, match=r"parse_args of .* takes \(provider\), expected .* extra_args_provider"):
        megatron_deepspeed._extend_arguments(module)


def test_after_parsing_everything_is_checked_before_anything_is_replaced(monkeypatch):
    order = []
    for where in ("checks.check_supported", "checks.check_data_of", "run.install_run"):
        name = where.partition(".")[2]
        target = f"megatron_ru.hosts.megatron_deepspeed_{where}"
        monkeypatch.setattr(target, lambda args, name=name: order.append((name, args)))
    monkeypatch.setattr(megatron_deepspeed, "start_rank", lambda listen: order.append(("start_rank", listen)))
    args = argparse.Namespace(ru_exit_signals=True)
    megatron_deepspeed._when_parsed(args)
    names = ["check_supported", "check_data_of", "install_run"]
    assert order == [("start_rank", True), *((name, args) for name in names)]
