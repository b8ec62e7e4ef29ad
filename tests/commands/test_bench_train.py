import json
import os
import signal

import pytest

from megatron_ru.commands.main import build_parser, discover_commands, main

SIZES = ["--variant", "llama3_tiny", "--layers", "1", "--sequence", "16", "--steps", "6", "--device", "cpu"]


def test_our_entry_trains_and_is_drawn_again_from_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.chdir(tmp_path)
    flags = "--ru-ops none --ru-metrics metrics.jsonl --log-interval 2"
    words = [*SIZES, "--flags", flags, "--against", "te", "--logs", "logs", "--json", "train.json"]
    assert main(["bench", "train", *words]) == 0
    shown = capsys.readouterr()
    assert "te skipped: TransformerEngine is not installed" in shown.out
    assert "megatron_ru: microseconds of a step by cause" in shown.out
    stored = json.loads((tmp_path / "train.json").read_text())
    [ours, te] = stored["rows"]
    assert (ours["status"], ours["flags"], te["status"]) == ("ok", flags, "skipped")
    document = ours["document"]
    assert (document["steps"], document["tokens_per_step"], document["traced_steps"]) == (6, 32, "4:6")
    # Padded by Megatron, as the peers are told.
    assert document["shape"]["vocabulary"] == 1024
    assert document["first_loss"] == pytest.approx(6.93, abs=0.1)
    assert {"forward and backward", "update"} == {one["part"] for one in document["causes"]}
    assert stored["command"] == (
        "megatron-ru bench train --against te --variant llama3_tiny --layers 1 --sequence 16 --steps 6 --device cpu "
        f"--flags '{flags}' --json train.json"
    )
    again = ["--from-json", "train.json", "--markdown", "train.md", "--plot", "train.png"]
    assert main(["bench", "train", *again]) == 0
    assert capsys.readouterr().out == shown.out
    assert "| megatron_ru |" in (tmp_path / "train.md").read_text()
    assert (tmp_path / "train.png").exists()
    # What the run told beside, and its page.
    log = (tmp_path / "logs" / "megatron_ru.log").read_text()
    assert log.count(" tokens/s: ") == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lm loss" in line]
    assert [line["iteration"] for line in steps] == [2, 4, 6]
    for line in steps:
        assert (
            0
            < line["tflop_s_per_gpu"]
            == pytest.approx(line["tokens_per_second"] * document["flops_per_step"] / 32 / 1e12)
        )
    assert main(["report", "."]) == 0
    assert "logs/megatron_ru.json: a step by cause" in (tmp_path / "report.html").read_text()


@pytest.fixture
def no_processes(monkeypatch):
    """The commands that would have been started."""
    from megatron_ru.experiments import process

    started = []

    def run_logged(what, words, log, environment, watch):
        started.append((what, list(words)))
        if what == "+ RoPE":
            os.kill(os.getpid(), signal.SIGINT)
        with open(words[-1], "w") as stream:
            json.dump({"step_seconds": 1.0, "forward_backward_seconds": 0.5, "device_name": "CPU"}, stream)

    monkeypatch.setattr(process, "run_logged", run_logged)
    return started


def test_each_setting_of_ours_and_each_peer_has_a_process(no_processes, capsys):
    assert main(["bench", "train", *SIZES, "--also", "fp8=--fp8-format e4m3", "--against", "hf,mcore"]) == 0
    assert [what for what, _ in no_processes] == ["megatron_ru", "fp8", "hf", "mcore"]
    assert "--use-distributed-optimizer" in no_processes[0][1]
    assert "--fp8-format" not in no_processes[0][1]
    assert no_processes[1][1][-4:-2] == ["--fp8-format", "e4m3"]


def test_an_interrupted_ladder_keeps_its_rungs(no_processes, tmp_path, capsys):
    assert main(["bench", "fused-ladder", *SIZES, "--json", str(tmp_path / "ladder.json")]) == 128 + signal.SIGINT
    assert [what for what, _ in no_processes] == ["PyTorch", "+ flash attention", "+ RoPE"]
    first, second = (words for _, words in no_processes[:2])
    assert first[first.index("--ru-attention") :][:4] == ["--ru-attention", "plain", "--ru-ops", "none"]
    assert "--ru-attention" not in second
    rows = json.loads((tmp_path / "ladder.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "missing", "missing", "missing", "missing"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "horovod"], "--against names horovod; expected none or some of hf,liger,compile,mcore,te,roof"),
        (["--variant", "gpt2"], "variant gpt2 has positions"),
        (["--layers", "0"], "--layers is 0, expected at least 1"),
        (["--also", "fp8"], "expected NAME=FLAGS"),
    ],
)
def test_bad_input(no_processes, words, message, capsys):
    assert main(["bench", "train", *SIZES, *words]) == 2
    assert message in capsys.readouterr().err
    assert no_processes == []


def test_help_of_both(capsys):
    parser = build_parser(discover_commands("bench"))
    for action in ("train", "fused-ladder"):
        with pytest.raises(SystemExit):
            parser.parse_args(["bench", action, "--help"])
        assert "--from-json FILE" in capsys.readouterr().out
