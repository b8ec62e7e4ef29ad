import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ru.commands.main import main
from megatron_ru.experiments.corpus import Corpus
from megatron_ru.experiments.demo import (
    MARKER,
    OUTPUTS,
    DemoSettings,
    closing_table,
    parameters_per_rank,
    training_words,
)

SUMMARY = {
    "validation": {"first": 8.35, "last": 4.175, "improvement": 0.5},
    "training": {"first": 8.4, "last": 4.2, "improvement": 0.5},
    "restarts": [(180, 4.75, 4.75)],
    "tokens_trained": 614400,
    "tokens_per_second": 5432.1,
    "launcher": "mpirun",
    "parameters_per_rank": {"TP 0 PP 1": 20, "TP 0 PP 0": 10},
    "seconds": {"text": 4.0, "training": 125.0},
}


def test_closing_table():
    assert closing_table(SUMMARY).split("\n") == [
        "",
        "                 first   last   change",
        "───────────────  ─────  ─────  ───────",
        "validation loss  8.350  4.175  -50.0 %",
        "training loss    8.400  4.200  -50.0 %",
        "",
        "restart at step 180: validation loss 4.750000 before it, the same after it",
        "614400 tokens trained on, 5432 tokens/s on 4 processes (mpirun), TP 2 x PP 2",
        "parameters per rank: TP 0 PP 0: 10, TP 0 PP 1: 20 (both stages hold the shared embedding)",
        "time: 2:09 min (text 4 s, training 2:05 min)",
    ]


def test_a_restart_that_changed_the_model_is_not_hidden():
    shown = closing_table({**SUMMARY, "restarts": [(180, 4.75, 4.875)]})
    assert "restart at step 180: validation loss 4.750000 before it, 4.875000 after it\n" in shown


def test_parameters_are_read_from_the_log_of_any_version(tmp_path):
    (tmp_path / "a.log").write_text(
        " > number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (1, 0, 0): 873216\n"
        "[0] > number of parameters on (tensor, pipeline) model parallel rank (0, 1): 873408\n"
    )
    assert parameters_per_rank(tmp_path / "a.log") == {"TP 1 PP 0": 873216, "TP 0 PP 1": 873408}


def test_megatron_evaluates_the_last_step_once():
    settings = DemoSettings()
    assert settings.steps % settings.evaluate_every != 0
    assert settings.stop_at % settings.evaluate_every == 0
    words = training_words(Path("d"), Corpus(tokenizer=Path("t"), prefix=Path("p"), documents=1, tokens=1), settings)
    given = dict(zip(words[:-1:2], words[1::2], strict=True))
    assert given["--tensor-model-parallel-size"] == given["--pipeline-model-parallel-size"] == "2"
    assert given["--save-interval"] == "1900"
    assert words[-1] == "--ru-validate-from-start"


def test_a_folder_of_others_is_refused(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} is not empty and holds no earlier run ({MARKER})" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_demo_from_text_to_figure(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environ = {**os.environ, "HOME": str(home)}
    environ.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ru", "demo", "--quick", "--output", "out"], cwd=tmp_path, env=environ,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {MARKER, ".cache", *OUTPUTS}
    # Nothing is written elsewhere.
    assert list(home.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["validation"]["improvement"] > 0.15
    [(step, before, after)] = summary["restarts"]
    assert (step, before) == (16, after)
    assert summary["parameters_per_rank"].keys() == {"TP 0 PP 0", "TP 0 PP 1", "TP 1 PP 0", "TP 1 PP 1"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm loss" in line] == list(range(1, 25))
    assert [line["iteration"] for line in lines if "validation lm loss" in line] == [0, 16, 16, 24]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "continuation.txt").read_text().startswith("берёза —")
    assert "validation loss" in done.stdout


@pytest.mark.slow
def test_a_stage_that_fails_names_its_log(tmp_path):
    # Every rank ends before it begins.
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    (spoilt / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'megatron_ru.pretrain_gpt' in sys.orig_argv:\n"
        "    print('x: error: the disk is gone', flush=True)\n"
        "    sys.exit(9)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(spoilt)}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ru", "demo", "--quick", "--output", str(tmp_path / "out")], env=environ,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    log = tmp_path / "out" / "train.log"
    assert f"the last lines of {log}:\nx: error: the disk is gone" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("megatron-ru: error: training ended with exit code ")
    assert done.stderr.splitlines()[-1].endswith(f"; the whole log is {log}")
