"""The entry point that torch calls: dormant unless asked, and never a broken `import torch`."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from megatron_ru import autoload

ROOMS = ("seams", "plugin", "engines", "hosts", "models", "ops", "commands")


def run(*words, cwd=None, **environ):
    """The finished process of this Python with the words; no variable of a launcher or of ours reaches it."""
    hidden = ("MEGATRON_RU", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in hidden and "OMPI" not in name}
    environ = {**clean, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def host(tmp_path):
    """A folder with the part of a Megatron-LM checkout that flags come from, and a script that shows what it got.

    `megatron` is a namespace package there, so `megatron.core` stays the installed one.
    """
    training = tmp_path / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").write_text("")
    (training / "arguments.py").write_text(
        "import argparse\n"
        "def add_megatron_arguments(parser):\n"
        "    for name in ('--tensor-model-parallel-size', '--pipeline-model-parallel-size',\n"
        "                 '--context-parallel-size'):\n"
        "        parser.add_argument(name, type=int, default=1)\n"
        "    return parser\n"
    )
    (tmp_path / "script.py").write_text(
        "import json, os, sys\n"
        "import torch\n"
        "from megatron.training.arguments import add_megatron_arguments\n"
        "import argparse\n"
        "parser = add_megatron_arguments(argparse.ArgumentParser())\n"
        "flags = [f for a in parser._actions for f in a.option_strings if f.startswith(('--ru', '--device'))]\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'CUDA_DEVICE_MAX_CONNECTIONS')\n"
        "print(json.dumps({'flags': flags, 'device': str(torch.zeros(1, device='cuda').device)\n"
        "    if torch.cuda.is_available() else None, 'environ': {n: os.environ.get(n) for n in names}}))\n"
        "if '--parse' in sys.argv:\n"
        "    sys.argv.remove('--parse')\n"
        "    parser.parse_args()\n"
    )
    return tmp_path


def test_the_entry_point_is_installed():
    found = importlib.metadata.entry_points(group="torch.backends")
    assert [point.value for point in found if point.name == "megatron_ru"] == ["megatron_ru.autoload:activate"]


def test_dormant_it_brings_and_costs_next_to_nothing():
    code = f"""
import sys, time
import torch
loaded = [room for room in {ROOMS} if f"megatron_ru.{{room}}" in sys.modules]
for name in [name for name in sys.modules if name.partition(".")[0] == "megatron_ru"]:
    del sys.modules[name]
begin = time.perf_counter()
import megatron_ru.autoload
megatron_ru.autoload.activate()
milliseconds = (time.perf_counter() - begin) * 1e3
print(loaded, "megatron" in sys.modules, torch.cuda.synchronize.__module__, sys.excepthook is sys.__excepthook__)
print(milliseconds)
"""
    done = run("-c", code)
    state, milliseconds = done.stdout.splitlines()
    assert state == "[] False torch.cuda True", done.stderr
    # Under one on an idle machine.
    assert float(milliseconds) < 50


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_nothing_but_1_wakes_it(monkeypatch, value):
    monkeypatch.setattr(autoload, "_is_launcher", lambda: pytest.fail("it went on"))
    if value is None:
        monkeypatch.delenv("MEGATRON_RU", raising=False)
    else:
        monkeypatch.setenv("MEGATRON_RU", value)
    autoload.activate()


def test_asked_it_enters_a_script_that_does_not_know_it(host):
    done = run("script.py", "--parse", "--device", "cpu", "--ru-variant", "lama2_tiny", cwd=host, MEGATRON_RU="1")
    found = json.loads(done.stdout)
    assert {"--device", "--ru-variant", "--ru-metrics", "--ru-init"} <= set(found["flags"])
    assert found["device"] == "cpu"
    assert found["environ"]["RANK"] == found["environ"]["LOCAL_RANK"] == "0"
    assert found["environ"]["WORLD_SIZE"] == found["environ"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert found["environ"]["MASTER_ADDR"] == "127.0.0.1"
    # Bad words end in one sentence, though the script knows nothing of our errors.
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("megatron_ru: error: unknown variant 'lama2_tiny' (did you mean llama2_tiny")


def test_ranks_that_contradict_each_other_end_in_one_sentence(host):
    environ = {"MEGATRON_RU": "1", "RANK": "0", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    done = run("script.py", cwd=host, **environ)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("megatron_ru: error: RANK=0 contradicts OMPI_COMM_WORLD_RANK=1")


def test_errors_of_the_host_are_shown_as_ever(host):
    (host / "fails.py").write_text("import torch\n1 / 0\n")
    done = run("fails.py", cwd=host, MEGATRON_RU="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().endswith("ZeroDivisionError: division by zero")


BREAKS = """
import sys
from types import ModuleType
broken = ModuleType("megatron_ru.hosts.megatron_lm")
def enter(words):
    raise KeyError("moved")
broken.enter = enter
import megatron_ru.autoload as autoload
autoload._is_ours = lambda: False
sys.modules["megatron_ru.hosts"] = ModuleType("megatron_ru.hosts")
sys.modules["megatron_ru.hosts.megatron_lm"] = broken
try:
    import torch
except Exception:
    print("the import broke")
print("went on")
"""


def test_a_mistake_of_ours_is_shown_and_does_not_look_like_a_broken_torch():
    done = run("-c", BREAKS, MEGATRON_RU="1")
    assert done.returncode == 1
    assert done.stdout == "", "the script went on without what it was given"
    assert "KeyError: 'moved'" in done.stderr
    assert "Failed to load the backend extension" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "megatron_ru: error: could not enter this process, see above; unset MEGATRON_RU to run without it"
    )


@pytest.mark.parametrize(
    ("arguments", "host"),
    [("deepspeed.add_config_arguments(parser)", "megatron_deepspeed"), ("", "megatron_lm"), (None, "megatron_lm")],
)
def test_the_host_is_the_checkout_of_the_script(tmp_path, monkeypatch, arguments, host):
    (tmp_path / "megatron").mkdir()
    if arguments is not None:
        (tmp_path / "megatron" / "arguments.py").write_text(arguments)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "pretrain_gpt.py"), "--lr", "1"])
    assert autoload._host() == host


def test_our_own_commands_enter_by_themselves():
    # They import torch while their own modules are half imported.
    done = run("-c", "import megatron_ru.plugin.arguments; print('fine')", MEGATRON_RU="1")
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["python", "-m", "torch.distributed.run", "script.py"], True),
        (["python", "-u", "-m", "torch.distributed.launch", "script.py"], True),
        (["/venv/bin/python", "/venv/bin/torchrun", "--nproc-per-node", "2", "script.py"], True),
        (["python", "/x/torch/distributed/run.py", "script.py"], True),
        (["/venv/bin/python", "/venv/bin/deepspeed", "--num_gpus", "2", "script.py"], True),
        (["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "script.py"], True),
        (["python", "pretrain_gpt.py", "--train-iters", "5"], False),
        (["python", "pretrain_gpt.py", "--data-path", "a", "--save", "runs/torchrun"], False),
        (["python", "-c", "import torch"], False),
    ],
)
def test_launchers_are_left_alone(monkeypatch, words, launches):
    monkeypatch.setattr(sys, "orig_argv", words)
    assert autoload._is_launcher() is launches


def test_torchrun_starts_and_its_ranks_are_entered(host):
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone", "script.py", "--device", "cpu",
               cwd=host, MEGATRON_RU="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--ru-variant" in json.loads(done.stdout.strip().splitlines()[-1])["flags"]
