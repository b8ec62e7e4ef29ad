import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_ru.benchmarks.measured_process import measure
from megatron_ru.benchmarks.tokenise_contest import ContestSettings, as_json, markdown, run
from megatron_ru.benchmarks.varied_corpus import write_varied_corpus
from megatron_ru.commands.main import main
from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.training import TokenizerSettings
from megatron_ru.tokenizer.training_hugging_face import train_hugging_face


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "in.jsonl"
    texts = [f"раз два {number}\nтри четыре пять" * 3 for number in range(50)]
    texts[5] = "строка первая\nвторая строка\nи <s>"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_repetitions_differ_and_are_always_the_same(tmp_path, text):
    size = 3 * text.stat().st_size
    found = write_varied_corpus([text], tmp_path / "a.jsonl", size, ["<s>"])
    assert write_varied_corpus([text], tmp_path / "b.jsonl", size, ["<s>"]) == found
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    texts, original = lines(tmp_path / "a.jsonl"), [one for one in lines(text) if "<s>" not in one]
    assert texts[:49] == original
    assert not set(texts[49:98]) & set(original)
    # The same words in another order, numbers apart.
    assert sorted(texts[50].split()) != sorted(original[0].split()) or texts[50] != original[1]
    assert (tmp_path / "a.jsonl").stat().st_size >= size
    assert found[0] == len(texts)
    assert found[1] >= 2


def test_an_empty_text_ends(tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    assert write_varied_corpus([tmp_path / "in.jsonl"], tmp_path / "a.jsonl", 100) == (0, 0)


def test_the_cost_of_children_is_counted(tmp_path):
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    memory = "x = bytearray(200_000_000)\nx[::4096] = b'1' * len(x[::4096])\n"
    parent = f"import subprocess, sys\nfor code in ({burn!r}, {memory!r}): subprocess.run([sys.executable, '-c', code])"
    cost = measure([sys.executable, "-c", parent], tmp_path / "log", {})
    assert 0.3 <= cost.processor_seconds < 5
    assert cost.wall_seconds >= 0.3
    assert 200 < cost.peak_megabytes < 400


def test_a_contender_that_fails_is_told_with_its_last_words(tmp_path):
    with pytest.raises(UserError, match=r"ended with code 3; its last words:\nsorry"):
        measure([sys.executable, "-c", "print('sorry'); raise SystemExit(3)"], tmp_path / "log", {})


def test_a_run_alone_and_its_forms(tmp_path, text, capsys):
    folder = tmp_path / "tok"
    train_hugging_face(lines(text), folder, TokenizerSettings(vocab_size=270))
    words = ["bench", "tokenise", "--input", str(text), "--tokenizer", str(folder), "--megabytes", "0.01"]
    words += ["--no-datatrove", "--repeats", "1", "--folder", str(tmp_path / "out")]
    words += ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert main(words) == 0
    [found] = json.loads((tmp_path / "r.json").read_text())
    assert [one["name"] for one in found["results"]] == ["ours"]
    assert found["results"][0]["megabytes_per_processor_second"] > 0
    page = (tmp_path / "r.md").read_text()
    assert page.startswith(
        "# Tokenising\n\n`megatron-ru bench tokenise --input in.jsonl --tokenizer tok --megabytes 0.01"
    )
    assert "| ours | megatron-ru" in page
    # What is written goes to readers elsewhere.
    assert str(tmp_path) not in page + (tmp_path / "r.json").read_text()
    assert (tmp_path / "out" / "scratch" / "ours.bin").exists()


def test_a_checkout_without_the_script_is_refused(tmp_path, text):
    folder = tmp_path / "tok"
    train_hugging_face(lines(text), folder, TokenizerSettings(vocab_size=270))
    settings = ContestSettings(text=text, tokenizer=folder, scratch=tmp_path / "s", megatron_lm=tmp_path)
    with pytest.raises(UserError, match=r"there is no \S*preprocess_data\.py; give a checkout of Megatron-LM"):
        run(settings)


@pytest.mark.slow
def test_datatrove_has_our_tokens(tmp_path, text):
    pytest.importorskip("datatrove")
    folder, alone = tmp_path / "tok", tmp_path / "alone"
    train_hugging_face(lines(text), folder, TokenizerSettings(vocab_size=270))
    alone.mkdir()
    shutil.copy(text, alone / "text.jsonl")
    write_varied_corpus([text], alone / "text.jsonl", 1000, ["<s>"])
    settings = ContestSettings(text=alone / "text.jsonl", tokenizer=folder, scratch=tmp_path / "s", repeats=1)
    results = run(settings, tell=lambda _: None)
    assert [(one.name, one.equal) for one in results] == [("ours", ""), ("datatrove", "tokens are ours")]
    assert "| datatrove |" in markdown(results, settings)
    assert json.loads(as_json(results, settings))["workers"] == 1
    assert Path(settings.scratch / "ours.idx").exists()
