import json
import os
import re
import subprocess
import sys

import pytest

from megatron_ru.commands.main import main
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "ru.jsonl"
    path.write_text("".join(json.dumps({"text": f"кошка {number}"}) + "\n" for number in range(100)))
    return str(path)


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "a.model"
    train_tokenizer(["кошка собака"] * 10, path, TokenizerSettings(vocab_size=285))
    return str(path)


def tokenize(text, model, prefix, *more: str) -> int:
    words = ["data", "tokenize", "--input", text, "--tokenizer", model, "--output", str(prefix)]
    return main([*words, "--workers", "1", *more])


def test_tokenize_then_check(tmp_path, text, model, capsys):
    prefix = tmp_path / "out" / "ru"
    assert tokenize(text, model, prefix) == 0
    captured = capsys.readouterr()
    # No bar: a file is no terminal.
    assert captured.err == ""
    found = re.match(rf"{prefix}: 100 documents, (\d+) tokens \(uint16\) from (\d+) bytes in ", captured.out)
    assert int(found[2]) == os.path.getsize(text)
    assert re.search(r" s: \d+ tokens/s, \d+\.\d\d MB/s\nencoded by .*\n$", captured.out)
    assert main(["data", "check", str(prefix), "--vocab-size", "285"]) == 0
    size = (tmp_path / "out" / "ru.bin").stat().st_size
    assert size == 2 * int(found[1])
    out = capsys.readouterr().out
    assert f"{prefix}: 100 documents, 100 sequences, {found[1]} tokens (uint16, {size} bytes), highest id " in out


def test_end_tokens_can_be_left_out(tmp_path, text, model):
    tokenize(text, model, tmp_path / "with")
    tokenize(text, model, tmp_path / "without", "--no-append-eod")
    sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("with", "without")]
    assert sizes[0] - sizes[1] == 2 * 100


def test_a_bar_is_drawn_when_asked_for(tmp_path, text, model, capsys):
    tokenize(text, model, tmp_path / "ru", "--progress")
    assert "tokenise: 100%" in capsys.readouterr().err


def test_malformed_lines_stop_or_are_counted(tmp_path, text, model, capsys):
    with open(text, "a") as stream:
        stream.write('{"text": 5}\n')
    before = sorted(tmp_path.iterdir())
    assert tokenize(text, model, tmp_path / "ru") == 2
    assert sorted(tmp_path.iterdir()) == before
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-ru: error: {text}:101: field 'text' should be a string, found a number")
    assert tokenize(text, model, tmp_path / "ru", "--skip-malformed") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"{text}:101: field 'text' should be a string, found a number (left out)",
        "left out 1 malformed lines",
    ]
    assert ": 100 documents" in captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "check", "{}/absent"], "there is no {}/absent.bin and no {}/absent.idx"),
        (["data", "check", "{}/ru", "--vocab-size", "200"], "but the vocabulary has 200 ids (0 to 199)"),
        (["data", "demo", "--output", "{}/demo.jsonl", "--limit", "0"], "--limit is 0; it must be"),
        (["data", "tokenize", "--input", "{}", "--tokenizer", "x", "--output", "{}/x"], "is a folder"),
        (["data", "tokenize", "--input", "{}/a.model", "--tokenizer", "{}/no", "--output", "{}/x"],
         "there is no tokenizer at {}/no"),
        (["data", "tokenize", "--input", "{}/ru.jsonl", "--tokenizer", "{}/a.model", "--output", "{}/x.bin"],
         "give their common prefix {}/x"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, text, model, capsys, words, message):
    tokenize(text, model, tmp_path / "ru")
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    assert main([word.format(tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-ru: error: ")
    assert message.replace("{}", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_truncated_bin_fails_the_check(tmp_path, text, model, capsys):
    tokenize(text, model, tmp_path / "ru")
    os.truncate(tmp_path / "ru.bin", 101)
    assert main(["data", "check", str(tmp_path / "ru")]) == 2
    assert "ru.bin is truncated: its index promises" in capsys.readouterr().err


def test_demo_writes_dictionary_entries(tmp_path, capsys):
    pytest.importorskip("wiki_ru_wordnet")
    assert main(["data", "demo", "--output", str(tmp_path / "a.jsonl"), "--limit", "30"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.jsonl: 30 documents\n"
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(records) == 30
    assert all(" — " in record["text"] or ":\n1. " in record["text"] for record in records)
    assert records[0]["source"] == "wiki-ru-wordnet"


def test_asking_for_help_imports_nothing_heavy():
    heavy = ("numpy", "sentencepiece", "torch", "tqdm")
    script = (
        "import sys\nfrom megatron_ru.commands import data, tokenizer\nimport argparse\n"
        "for module in (data, tokenizer): module.add_arguments(argparse.ArgumentParser())\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
