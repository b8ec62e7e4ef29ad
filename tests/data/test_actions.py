import json

import pytest

from megatron_ru.commands.main import main
from tests.data.conftest import outputs


def test_run_says_what_became_of_the_documents(config_of, tmp_path, capsys):
    config = config_of()
    assert main(["data", "run", str(tmp_path / "out.yaml"), "--workers", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "read", "exact_dedup", "texts", "tokenise", "pack", "mixture", "publish",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    dropped = manifest["steps"]["texts"]["dropped"]
    assert f"dropped: {dropped['duplicate']} duplicate, {dropped['too_short']} too short" in said[2]
    assert config.output == str(tmp_path / "out")


def test_until_and_progress(config_of, tmp_path, capsys):
    config_of()
    assert main(["data", "run", str(tmp_path / "out.yaml"), "--workers", "1", "--until", "texts", "--progress"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert "texts: 100%" in shown.err
    assert main(["data", "run", str(tmp_path / "out.yaml"), "--until", "nothing"]) == 2
    assert "'nothing' is no step of this pipeline" in capsys.readouterr().err


def test_dedup_alone(corpus, tmp_path, capsys):
    folder, texts = corpus
    files = [str(folder / name) for name in ("ru_1.jsonl", "ru_2.jsonl.gz", "en.jsonl")]
    assert main(["data", "dedup", "--input", *files, "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert f"{len(set(texts))} documents; dropped: {len(texts) - len(set(texts))} duplicate" in capsys.readouterr().out
    kept = [
        json.loads(line)["text"]
        for path in sorted((tmp_path / "out/steps/texts").glob("*.jsonl"))
        for line in path.open()
    ]
    assert kept == list(dict.fromkeys(texts))
    again = outputs(tmp_path / "out")
    assert main(["data", "dedup", "--input", *files, "--output", str(tmp_path / "out"), "--workers", "0"]) == 2
    assert outputs(tmp_path / "out") == again


def test_report(config_of, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config_of()
    main(["data", "run", str(tmp_path / "out.yaml"), "--workers", "1"])
    capsys.readouterr()
    assert main(["data", "report", str(tmp_path / "out"), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    assert (tmp_path / "page.html").stat().st_size > 10_000
