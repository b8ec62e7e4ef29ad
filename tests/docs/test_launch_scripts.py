"""The scripts in launch/: sound bash, flags that Megatron knows, and the command that each starts."""

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_ru
from megatron_ru.models.variant import all_variants

PROJECT = Path(megatron_ru.__file__).parents[1]
BY_HAND = sorted((PROJECT / "launch").glob("*.sh"))
STARTERS = [script for script in BY_HAND if script.name != "training.sh"]
RENDERED = sorted((PROJECT / "launch" / "jobs").glob("*.sh"))
SCRIPTS = [*BY_HAND, *RENDERED]

# Prints what it was called with, one word to a line.
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n'


@pytest.fixture
def clone(tmp_path):
    """A folder like a clone, in which every program that a script starts prints its words instead."""
    shutil.copytree(PROJECT / "launch", tmp_path / "launch")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("torchrun", "megatron-ru", "mpirun", "srun"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    return tmp_path


def started(clone, script, *words, **environ):
    environ = {"PATH": f"{clone / '.venv' / 'bin'}:/usr/bin:/bin", **environ}
    program = ["bash", f"launch/{script}", *words]
    return subprocess.run(program, cwd=clone, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(PROJECT / "launch")))
def test_is_sound_bash(script):
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("script", "environ", "first"),
    [
        ("torchrun_one_node.sh", {"GPUS": "4"},
         ["torchrun", "--nproc-per-node", "4", "-m", "megatron_ru.pretrain_gpt"]),
        ("torchrun_several_nodes.sh", {"NODE": "1", "MASTER": "10.0.0.1"},
         ["torchrun", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "8", "--master-addr", "10.0.0.1",
          "--master-port", "29500", "-m", "megatron_ru.pretrain_gpt"]),
        ("mpirun.sh", {},
         ["mpirun", "-np", "16", "--hostfile", "hostfile", "--map-by", "ppr:8:node", "--bind-to", "none",
          "{clone}/.venv/bin/megatron-ru", "pretrain_gpt"]),
        ("slurm.sh", {}, ["srun", "--kill-on-bad-exit=1", ".venv/bin/megatron-ru", "pretrain_gpt"]),
    ],
)  # fmt: skip
def test_starts_the_run_of_training_sh(clone, script, environ, first):
    shown = started(clone, script, "--log-interval", "7", VARIANT="ru_29b", TP="4", **environ)
    assert shown.returncode == 0, shown.stderr
    words = shown.stdout.splitlines()
    assert words[: len(first)] == [word.format(clone=clone) for word in first]
    training = words[len(first) :]
    assert training[:2] == ["--ru-variant", "ru_29b"]
    assert training[-2:] == ["--log-interval", "7"]
    arguments = parsed(training)
    assert (arguments.tensor_model_parallel_size, arguments.sequence_parallel, arguments.bf16) == (4, True, True)
    assert (arguments.save, arguments.load) == ("runs/ru_29b", "runs/ru_29b")
    assert arguments.log_interval == 7


def parsed(words):
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ru.plugin.arguments import extend_parser

    parser = extend_parser(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    arguments, rest = argparse.ArgumentParser.parse_known_args(parser, words)
    assert rest == []
    return arguments


def test_every_starter_is_tried_above():
    tried = {"torchrun_one_node.sh", "torchrun_several_nodes.sh", "mpirun.sh", "slurm.sh"}
    assert {script.name for script in STARTERS} == tried


def test_several_nodes_ask_for_what_only_the_user_knows(clone):
    shown = started(clone, "torchrun_several_nodes.sh", MASTER="10.0.0.1")
    assert shown.returncode != 0
    assert "NODE: the number of this machine, from 0" in shown.stderr


def test_readme_lists_every_script():
    folder = PROJECT / "launch"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert [script for script in SCRIPTS if f"({script.relative_to(folder)})" not in text] == []


def test_rendered_scripts_are_fresh():
    program = [sys.executable, str(PROJECT / "launch" / "render_jobs.py"), "--check"]
    shown = subprocess.run(program, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_rendered_scripts_are_those_that_are_rendered():
    assert [script.name for script in RENDERED] == sorted(name for name, _, _ in examples())


def test_a_stale_script_is_named_with_what_to_do(tmp_path):
    shutil.copytree(PROJECT / "launch", tmp_path / "launch")
    job = tmp_path / "launch" / "jobs" / "slurm.sh"
    job.write_text(job.read_text() + "# mine\n")
    program = [sys.executable, str(tmp_path / "launch" / "render_jobs.py")]
    shown = subprocess.run([*program, "--check"], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (1, f"stale: {job}: python launch/render_jobs.py\n")
    subprocess.run(program, check=True)
    assert job.read_bytes() == (PROJECT / "launch" / "jobs" / "slurm.sh").read_bytes()


@pytest.mark.parametrize("name", ["abci_v.sh", "abci_a.sh", "slurm_container.sh", "slurm_array.sh"])
def test_rendered_scripts_train_with_flags_of_megatron(name):
    """The command of the script as bash reads it, without what comes after."""
    text = (PROJECT / "launch" / "jobs" / name).read_text(encoding="utf-8")
    command = re.search(r"(?s)\nru_command=\(\n.*?\n\)\n", text)[0]
    shown = subprocess.run(
        ["bash", "-c", f'{command}printf "%s\\n" "${{ru_command[@]}}"'], capture_output=True, text=True
    )
    words = shown.stdout.splitlines()
    if words[0] == "bash":
        words = shlex.split(words[2].removeprefix("exec ").replace("$RU_ARRAY_INDEX", "3"))
    assert words[0].endswith("megatron-ru")
    assert words[1] == "pretrain_gpt"
    arguments = parsed(words[2:])
    assert arguments.ru_variant in all_variants()
    assert arguments.save_interval == arguments.eval_interval == 250
    if name == "abci_v.sh":
        assert (arguments.micro_batch_size, arguments.tensor_model_parallel_size) == (1, 4)
        assert (arguments.pipeline_model_parallel_size, arguments.recompute_granularity) == (8, "full")
        assert not arguments.bf16, "V100 has none"


def examples():
    path = PROJECT / "launch" / "render_jobs.py"
    spec = importlib.util.spec_from_file_location("render_jobs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXAMPLES
