import json

from megatron_ru.commands.main import main


def test_page_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"iteration": one, "lm loss": 3.0 - one, "learning_rate": None} for one in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run)]) == 0
    assert "lm loss: 2.0000 → 1.0000" in capsys.readouterr().out
    assert (run / "figures" / "loss.png").stat().st_size > 1000
    assert "data:image/png" in (run / "report.html").read_text()
    # The file alone, with outputs elsewhere.
    words = ["--output", str(tmp_path / "a.html"), "--figures", str(tmp_path / "pictures")]
    assert main(["report", str(run / "metrics.jsonl"), *words]) == 0
    assert (tmp_path / "a.html").exists()
    assert (tmp_path / "pictures" / "loss.png").exists()


def test_a_folder_without_metrics_is_bad_input(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no *.jsonl with training steps" in capsys.readouterr().err
