import subprocess
import sys

import pytest

from megatron_ru.commands.launch import job_of
from megatron_ru.commands.main import build_parser, discover_commands, main
from megatron_ru.foundation.errors import UserError


def job(*words):
    return job_of(build_parser(discover_commands()).parse_args(["launch", *words]))


def test_dry_run_prints_exactly_what_submit_sends(tmp_path, monkeypatch):
    (tmp_path / "qsub").write_text(f"#!/bin/bash\ncat > {tmp_path}/sent\necho 12\n")
    (tmp_path / "qsub").chmod(0o755)
    words = ["abci-v", "--nodes", "2", "--time", "1:8:00:00", "--group", "g1", "--output", str(tmp_path / "logs")]
    command = ["--", "echo", "ё", "$(x)", "--", "--submit"]
    program = [sys.executable, "-m", "megatron_ru", "launch", *words]
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    shown = subprocess.run([*program, *command], capture_output=True, env=environ)
    dry = subprocess.run([*program, "--dry-run", *command], capture_output=True, env=environ)
    assert (shown.returncode, dry.returncode) == (0, 0)
    assert shown.stdout == dry.stdout
    assert not (tmp_path / "sent").exists()
    sent = subprocess.run([*program, "--submit", *command], capture_output=True, env=environ)
    assert (sent.returncode, sent.stdout, sent.stderr) == (0, b"12\n", b"")
    assert (tmp_path / "sent").read_bytes() == dry.stdout
    assert "    echo 'ё' '$(x)'\n    --\n    --submit\n".encode() in dry.stdout


def test_every_option_reaches_the_job():
    found = job(
        "slurm", "--nodes", "3", "--gpus-per-node", "4", "--cpus-per-task", "2", "--time", "2h", "--name", "n1",
        "--group", "g1", "--queue", "q1", "--modules", "a/1", "b/2", "--container", "image", "--mounts", "/a:/b",
        "/c:/d:ro", "--env", "A=1", "--env", "B=x=y z", "--output", "logs", "--array", "1-3", "--dependency",
        "afterok:4", "--requeue", "--signal", "TERM", "--signal-seconds", "60", "--interfaces", "eth0", "ib0",
        "--torchrun", "--retries", "3", "--stall", "60", "--start-timeout", "90.5", "--grace", "5", "--spares", "1",
        "--", "run", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size=3", "--", "x",
    )  # fmt: skip
    assert (found.nodes, found.gpus_per_node, found.cpus_per_task, found.time) == (3, 4, 2, "2h")
    assert (found.name, found.group, found.queue, found.modules) == ("n1", "g1", "q1", ("a/1", "b/2"))
    assert (found.container, found.mounts) == ("image", ("/a:/b", "/c:/d:ro"))
    assert found.env == {"A": "1", "B": "x=y z"}
    assert (found.output, found.array, found.dependency, found.requeue) == ("logs", "1-3", "afterok:4", True)
    assert (found.signal, found.signal_seconds, found.interfaces) == ("TERM", 60, ("eth0", "ib0"))
    assert (found.torchrun, found.tensor_parallel, found.pipeline_parallel, found.data_parallel) == (True, 2, 3, 2)
    assert (found.guard, found.retries, found.stall, found.start_timeout) == (True, 3, 60.0, 90.5)
    assert (found.grace, found.spares) == (5.0, 1)
    assert not job("slurm", "--no-guard", "--", "x").guard
    assert found.command[0] == "run"
    assert found.command[-2:] == ("--", "x")


@pytest.mark.parametrize(
    "command",
    [["a", "--", "b", "--", "--"], ["--", "x"], ["a", "--nodes", "7", "-h", "--submit"], ["a", "", "--", "--name=x"]],
)
def test_words_behind_the_dashes_are_the_commands_own(command):
    if command[0] == "--":
        with pytest.raises(UserError, match="the command begins with '--'"):
            job("slurm", "--nodes", "2", "--", *command)
        return
    found = job("slurm", "--nodes", "2", "--", *command)
    assert (found.nodes, list(found.command)) == (2, command)


@pytest.mark.parametrize("words", [["slurm"], ["slurm", "--"], ["--", "true"], ["slurm", "--nodes", "x", "--", "true"]])
def test_what_the_parser_refuses(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(["launch", *words])
    assert error.value.code == 2
    assert capsys.readouterr().out == ""


def test_gpus_are_those_of_the_target():
    assert job("abci-v", "--", "x").gpus_per_node == 4
    assert job("local", "--", "x").gpus_per_node == 1
    assert job("mpirun", "--hostfile", "h", "--", "x").hostfile == "h"
    assert job("local", "--virtual-environment", ".venv", "--", "x").virtual_environment == ".venv"


def test_the_preset_is_behind_the_command_and_counts():
    found = job("abci-v", "--nodes", "16", "--preset", "13b_v100", "--", "megatron-ru", "pretrain_gpt")
    assert found.command[:4] == ("megatron-ru", "pretrain_gpt", "--micro-batch-size", "1")
    assert (found.tensor_parallel, found.pipeline_parallel, found.data_parallel) == (4, 8, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["abci"], "unknown target 'abci' (did you mean abci-v or abci-h or abci-a?)"),
        (["abci-v", "--gpus-per-node", "8"], "a node of abci-v has 4 GPUs"),
        (["slurm", "--env", "A"], "--env A has no value: write --env A=VALUE"),
        (["slurm", "--env", "A=1", "--env", "A=2"], "--env gives A both '1' and '2': keep one of them"),
        (["slurm", "--time", "30"], "time limit '30' is not HH:MM:SS"),
        (["slurm", "--preset", "none"], "unknown preset 'none'"),
        (["abci-v", "--nodes", "4", "--time", "1h", "--group", "g", "--preset", "13b_v100"],
         "4 nodes x 4 GPUs = 16 ranks do not divide into model replicas of TP 4 x PP 8 = 32"),
        (["abci-h", "--time", "1h", "--group", "g", "--check"], "cannot check a job without starting it"),
        (["slurm", "--check"], "slurm needs sbatch, and there is none on PATH"),
        (["abci-v", "--time", "1h", "--group", "g", "--submit"], "abci-v needs qsub, and there is none on PATH"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_2(capsys, monkeypatch, words, sentence):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", *words, "--", "true"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert sentence in output.err
    assert len(output.err.splitlines()) == 1


def test_local_is_checked_by_bash():
    assert main(["launch", "local", "--check", "--", "true"]) == 0


def test_the_code_of_a_job_that_runs_here():
    assert main(["launch", "local", "--gpus-per-node", "2", "--submit", "--", "bash", "-c", "exit 5"]) == 5
