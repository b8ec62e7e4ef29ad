import json
import os
import signal

import pytest

from megatron_ru.commands.main import build_parser, discover_commands, main


@pytest.fixture
def small(monkeypatch):
    """The walk over ops with two of a few numbers, so that the command takes no time."""
    from megatron_ru.benchmarks import op_benchmark
    from megatron_ru.foundation.registry import Registry
    from tests.benchmarks.conftest import make_op

    registry = Registry("op")
    for name in ("cube", "square"):
        registry.register(name)(make_op(name))
    monkeypatch.setattr(op_benchmark, "OPS", registry)
    monkeypatch.setattr(op_benchmark, "copy_ceiling", lambda device: 10.0)
    monkeypatch.setattr(op_benchmark, "keep_memory", lambda: True)


def test_writes_what_it_is_asked_for(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    words = ["--only", "square", "--against", "torch", "--device", "cpu", "--seconds-per-case", "0.003"]
    files = [str(tmp_path / name) for name in ("ops.json", "ops.md", "ops.png")]
    assert main(["bench", "ops", *words, "--json", files[0], "--markdown", files[1], "--plot", files[2]]) == 0
    shown = capsys.readouterr().out
    assert "square  4x3   float32" in shown
    assert "faster than every peer in" in shown
    stored = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))
    assert {row["contender"] for row in stored["rows"]} == {"megatron_ru", "torch"}
    assert {row["op"] for row in stored["rows"]} == {"square"}
    page = (tmp_path / "ops.md").read_text(encoding="utf-8")
    assert "## square" in page
    assert (tmp_path / "ops.png").exists()
    # As it is typed; where the files lie on this machine is nobody's concern.
    command = (
        "megatron-ru bench ops --only square --against torch --device cpu --seconds-per-case 0.003 "
        "--json ops.json --markdown ops.md --plot ops.png"
    )
    assert stored["command"] == command
    assert f"- command: `{command}`\n" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_with_what_it_has(small, tmp_path, monkeypatch, capsys, number):
    from megatron_ru.benchmarks import op_benchmark
    from tests.benchmarks.conftest import make_op

    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))

    def stop(x):
        os.kill(os.getpid(), number)
        return x * x

    op_benchmark.OPS.register("zeta")(make_op("zeta", function=stop))
    files = [str(tmp_path / name) for name in ("ops.json", "ops.md", "ops.png")]
    words = ["--against", "torch", "--device", "cpu", "--seconds-per-case", "0.003"]
    code = main(["bench", "ops", *words, "--json", files[0], "--markdown", files[1], "--plot", files[2]])
    assert code == 128 + number
    shown = capsys.readouterr().out
    assert "square  4x3   float32" in shown
    assert "interrupted, 1 of 3 cases missing: zeta 4x3\n" in shown
    stored = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))
    assert [row["op"] for row in stored["rows"]] == ["cube", "cube", "square", "square"]
    assert [one["op"] for one in stored["missing"]] == ["zeta"]
    assert "interrupted, 1 of 3 cases missing: zeta 4x3" in (tmp_path / "ops.md").read_text(encoding="utf-8")
    assert (tmp_path / "ops.png").exists()


def test_interruption_before_the_first_row(small, tmp_path, monkeypatch, capsys):
    from megatron_ru.benchmarks import op_benchmark
    from tests.benchmarks.conftest import make_op

    def stop(x):
        os.kill(os.getpid(), signal.SIGTERM)
        return x * x

    op_benchmark.OPS._members["cube"] = make_op("cube", function=stop)
    json_file = tmp_path / "ops.json"
    words = ["--against", "none", "--device", "cpu", "--json", str(json_file), "--plot", str(tmp_path / "ops.png")]
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    assert main(["bench", "ops", *words]) == 143
    assert "interrupted, 2 of 2 cases missing: cube 4x3, square 4x3" in capsys.readouterr().out
    assert json.loads(json_file.read_text(encoding="utf-8"))["rows"] == []


def test_against_none_times_ours_alone(small, capsys):
    assert main(["bench", "ops", "--device", "cpu", "--against", "none", "--seconds-per-case", "0.003"]) == 0
    shown = capsys.readouterr().out
    assert "cube" in shown
    assert "faster than every peer" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "cub"], "unknown op 'cub' (did you mean cube?)"),
        (["--against", "ligr"], "unknown peer 'ligr' (did you mean liger?)"),
        (["--tokens", "8k"], "--tokens '8k' holds something else than whole numbers"),
        (["--seconds-per-case", "-1"], "--seconds-per-case is -1.0, expected more than 0"),
    ],
)
def test_wrong_words_are_one_sentence(small, words, message, capsys):
    assert main(["bench", "ops", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_words_as_they_are_documented():
    arguments = build_parser(discover_commands()).parse_args(
        ["bench", "ops", "--only", "rms_norm,rope", "--tokens", "8192,16384", "--hidden", "4096", "--timing", "graph"]
    )
    assert (arguments.only, arguments.tokens, arguments.timing) == ("rms_norm,rope", "8192,16384", "graph")
    assert arguments.seconds_per_case == 0.15


def test_starts_are_measured_and_written(tmp_path, monkeypatch, capsys):
    from megatron_ru.benchmarks import restart
    from megatron_ru.benchmarks.restart import Results

    def measured(settings, command, finished):
        results = Results(settings=settings, command=command, machine={"gpu": None, "cores": 2, "processor": "P",
                                                                       "torch": "1", "megatron_core": "2"})  # fmt: skip
        parts = ("imports", "process_group", "build", "load", "datasets", "first_step", "other", "total")
        memory = {"cpu_bytes": 10**9, "gpu_bytes": 0}
        results.cases.append({"kind": "meta", "start": "fresh", "parts": {f"{part}_seconds": 1.5 for part in parts},
                              "built": memory, "stepped": memory, "cpu_seconds": 2.0})  # fmt: skip
        finished(results)
        return results

    monkeypatch.setattr(restart, "run", measured)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    files = ["--json", str(tmp_path / "restart.json"), "--plot", str(tmp_path / "restart.png")]
    assert main(["bench", "restart", "--size", "2x128x352", "--kinds", "meta", "--device", "cpu", *files]) == 0
    shown = capsys.readouterr().out
    assert "meta, fresh: 1.5 s" in shown
    assert "optimizer adamw, 2 cores of P" in shown
    stored = json.loads((tmp_path / "restart.json").read_text())
    command = "megatron-ru bench restart --size 2x128x352 --kinds meta --device cpu"
    assert stored["command"] == f"{command} --json restart.json --plot restart.png"
    assert (tmp_path / "restart.png").exists()


def test_starts_that_cannot_be_are_refused(capsys):
    assert main(["bench", "restart", "--repeat", "0"]) == 2
    assert main(["bench", "restart", "--size", "8b"]) == 2
    assert "--size 8b is none of tiny, 100m, 1b, 7b" in capsys.readouterr().err
