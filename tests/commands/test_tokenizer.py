import gzip
import json

import pytest

from megatron_ru.commands.main import main
from megatron_ru.tokenizer.loading import load_tokenizer

TEXT = "кошка и собака, глава {}: медведь в лесу"


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "ru.jsonl.gz"
    lines = "".join(json.dumps({"text": TEXT.format(number)}) + "\n" for number in range(500))
    path.write_bytes(gzip.compress(lines.encode()))
    return str(path)


def train(text, tmp_path, *more: str) -> int:
    output = str(tmp_path / "a.model")
    return main(["tokenizer", "train", "--input", text, "--output", output, *more])


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_train_writes_a_tokenizer_and_says_so(tmp_path, text, capsys, model_type):
    assert train(text, tmp_path, "--model-type", model_type, "--vocab-size", "290") == 0
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert tokenizer.vocab_size == 290
    sentence = TEXT.format(1234)
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    out = capsys.readouterr().out
    assert f"a.model: {model_type}, 290 ids, learned from 500 lines" in out
    assert out.endswith("one token per digit: yes\n")


def test_report_counts_each_file(tmp_path, text, capsys):
    train(text, tmp_path, "--vocab-size", "300")
    capsys.readouterr()
    assert main(["tokenizer", "report", "--tokenizer", str(tmp_path / "a.model"), "--input", text, text]) == 0
    head, digits, names, first, second = capsys.readouterr().out.splitlines()
    assert head.endswith("a.model, 300 ids")
    assert digits == "one token per digit: yes"
    assert names.split("  ")[-2:] == ["characters per token", "tokens per word"]
    assert first == second
    file, documents, characters, words, tokens, per_token, per_word = first.split()
    assert (file, documents, words) == (text, "500", "4000")
    assert int(characters) == sum(len(TEXT.format(number)) for number in range(500))
    assert float(per_token) == pytest.approx(int(characters) / int(tokens), abs=5e-4)
    assert float(per_word) == pytest.approx(int(tokens) / 4000, abs=5e-4)


def test_report_names_pieces_that_join_digits(tmp_path, text, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"12": 0, "a": 1}, "a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(["tokenizer", "report", "--tokenizer", str(tmp_path), "--input", text]) == 0
    assert "one token per digit: no (1 longer pieces hold one: 12)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vocab-size", "5000"], "a vocabulary of 5000 is too large for this text"),
        (["--vocab-size", "-1"], "the vocabulary size is -1"),
        (
            ["--vocab-size", "300", "--text-field", "body"],
            "ru.jsonl.gz:1: no field 'body' (its fields: 'text')",
        ),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, text, capsys, more, message):
    assert train(text, tmp_path, *more) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron-ru: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "a.model").exists()


def test_malformed_lines_are_counted_at_the_end(tmp_path, text, capsys):
    with gzip.open(text, "ab") as stream:
        stream.write(b"nonsense\n")
    assert train(text, tmp_path, "--vocab-size", "300", "--skip-malformed") == 0
    error = capsys.readouterr().err
    assert f"{text}:501: not JSON" in error
    assert error.endswith("left out 1 malformed lines\n")
