"""Entering a Megatron-LM script, as far as it can be seen without one."""

import argparse
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts import megatron_lm
from megatron_ru.hosts.megatron_lm import enter, run_host


def test_no_script(tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    with pytest.raises(UserError) as error:
        run_host(str(script), [])
    assert str(error.value) == f"{script} is not a file, expected the pretrain_gpt.py of a Megatron-LM checkout"


def test_a_script_without_megatron_around_it(tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("")
    with pytest.raises(UserError) as error:
        run_host(str(script), [])
    assert str(error.value) == (
        f"{tmp_path} has no folder megatron/core, expected a Megatron-LM checkout (core 0.16 to 0.20) around {script}"
    )


def test_the_script_runs_as_python_would_run_it(tmp_path, monkeypatch):
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("import sys\nsys.seen = (__name__, __file__, sys.argv, sys.path[0])\n")
    entered = []
    monkeypatch.setattr(megatron_lm, "enter", entered.append)
    monkeypatch.setattr(sys, "argv", ["megatron-ru", "run_host"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "seen", None, raising=False)
    run_host(str(script), ["--lr", "1"])
    assert entered == [["--lr", "1"]]
    assert sys.seen == ("__main__", str(script), [str(script), "--lr", "1"], str(tmp_path))


@pytest.fixture
def entering(monkeypatch):
    """The calls that `enter` makes outside this process's own state."""
    calls = []
    monkeypatch.setattr(megatron_lm, "_entered", False)
    one = SimpleNamespace(rank=0, world_size=1)
    monkeypatch.setattr(megatron_lm, "meet_ranks", lambda: calls.append("ranks") or one)
    monkeypatch.setattr(megatron_lm, "when_imported", lambda name, act: calls.append((name, act)))
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    yield calls
    from megatron_ru.seams.cpu_device import CPU_DEVICE

    CPU_DEVICE.undo()
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)


def test_ranks_first_then_the_device_then_the_wait(entering):
    from megatron_ru.seams.cpu_device import CPU_DEVICE

    enter(["--device", "cpu"])
    assert entering == ["ranks", ("megatron.training.arguments", megatron_lm._extend_arguments)]
    assert CPU_DEVICE.installed
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    enter(["--device", "cpu"])
    assert len(entering) == 2, "entered twice"


def host_arguments(monkeypatch, add):
    module = ModuleType("host_arguments_for_test")
    module.add_megatron_arguments = add
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_our_flags_come_after_megatron_s(monkeypatch):
    def add_megatron_arguments(parser, extra=None):
        parser.add_argument("--seq-length", type=int)
        return parser

    module = host_arguments(monkeypatch, add_megatron_arguments)
    megatron_lm._extend_arguments(module)
    parser = module.add_megatron_arguments(argparse.ArgumentParser(), extra=1)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert flags.index("--seq-length") < flags.index("--ru-variant") < flags.index("--device")
    # A script that adds them again gets the same parser.
    again = module.add_megatron_arguments
    assert len(again(argparse.ArgumentParser())._actions) == len(parser._actions)


def test_a_parser_function_that_moved_is_named(monkeypatch):
    module = host_arguments(monkeypatch, lambda builder: builder)
    with pytest.raises(UserError, match=r"add_megatron_arguments of .* takes \(builder\), expected it to take parser"):
        megatron_lm._extend_arguments(module)
    del module.add_megatron_arguments
    with pytest.raises(UserError, match="add_megatron_arguments was not found in"):
        megatron_lm._extend_arguments(module)


def test_after_parsing_everything_is_checked_before_anything_is_replaced(monkeypatch):
    order = []
    for where in ("checks.check_host", "checks.check_checkpoint_format", "checks.check_data", "run.install_run"):
        name = where.partition(".")[2]
        monkeypatch.setattr(f"megatron_ru.plugin.{where}", lambda args, name=name: order.append((name, args)))
    # Before anything can be refused: a keeper is to hear of that too.
    monkeypatch.setattr(megatron_lm, "start_rank", lambda listen: order.append(("start_rank", listen)))
    args = argparse.Namespace(ru_exit_signals=True)
    megatron_lm._when_parsed(args)
    names = ["check_host", "check_checkpoint_format", "check_data", "install_run"]
    assert order == [("start_rank", True), *((name, args) for name in names)]
