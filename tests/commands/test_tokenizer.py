import gzip
import json
import re

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


def test_train_writes_a_folder_for_hugging_face(tmp_path, text, capsys):
    words = ["tokenizer", "train", "--input", text, "--output", str(tmp_path / "hf"), "--vocab-size", "290"]
    assert main([*words, "--special-tokens", "<|user|>"]) == 0
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.control_pieces() == ["<unk>", "<s>", "</s>", "<pad>", "<|user|>"]
    out = capsys.readouterr().out
    assert "hf: bpe, 290 ids, learned from 500 documents" in out
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_output_says_which_library_trains(tmp_path, text, capsys):
    words = ["tokenizer", "train", "--input", text, "--vocab-size", "290", "--output"]
    assert main([*words, str(tmp_path / "hf" / "tokenizer.json")]) == 0
    assert (tmp_path / "hf" / "tokenizer_config.json").exists()
    assert main([*words, str(tmp_path / "a.json")]) == 2
    assert "a.json is no name for a tokenizer; give a folder, FOLDER/tokenizer.json" in capsys.readouterr().err


def test_train_learns_from_a_sample_by_weights(tmp_path, text, capsys):
    words = ["--vocab-size", "290", "--sample", "2K", "--domain-field", "file", "--weights", "ru=1"]
    assert train(text, tmp_path, *words) == 0
    out = capsys.readouterr().out
    drawn = re.match(r"sample of ru: (\d+) documents, (\d+) of 2000 characters\n", out)
    assert 2000 <= int(drawn[2]) < 2050
    assert f"learned from {drawn[1]} lines" in out


def test_report_puts_tokenizers_side_by_side(tmp_path, text, capsys):
    pytest.importorskip("matplotlib")
    train(text, tmp_path, "--vocab-size", "300")
    (tmp_path / "a.model").rename(tmp_path / "b.model")
    train(text, tmp_path, "--vocab-size", "290")
    capsys.readouterr()
    files = {kind: tmp_path / "out" / f"r.{kind}" for kind in ("json", "markdown", "plot", "curves")}
    words = ["tokenizer", "report", "--tokenizer", str(tmp_path / "a.model"), f"big={tmp_path / 'b.model'}"]
    words += ["--input", text, "--words", "кошка", *[f"--{kind}={path}" for kind, path in files.items()]]
    assert main(words) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    characters = sum(len(TEXT.format(number)) for number in range(500))
    for name in ("a", "big"):
        row = next(row for row in rows if row[:2] == ["all", name])
        documents, per_token, per_word, _, tokens = row[2:]
        assert float(per_token) == pytest.approx(characters / int(tokens), abs=5e-4)
        assert float(per_word) == pytest.approx(int(tokens) / 4000, abs=5e-4)
        assert documents == "500"
    found = json.loads(files["json"].read_text())
    assert found["fertility"]["file ru"]["big"]["documents"] == 500
    assert found["habits"]["a"]["one_token_per_digit"]
    assert "## Words" in files["markdown"].read_text()
    for kind in ("plot", "curves"):
        assert files[kind].read_bytes().startswith(b"\x89PNG")


def test_report_names_pieces_that_join_digits(tmp_path, text, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"12": 0, "a": 1}, "a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(["tokenizer", "report", "--tokenizer", str(tmp_path), "--input", text]) == 0
    assert "no (12)" in capsys.readouterr().out


def test_two_tokenizers_of_one_name_need_names(tmp_path, text, capsys):
    words = ["tokenizer", "report", "--tokenizer", "a/x.model", "b/x.model", "--input", text]
    assert main(words) == 2
    assert "two tokenizers are called 'x' (a/x.model, b/x.model); give names: NAME=PATH" in capsys.readouterr().err


def test_convert_tells_on_how_much_text_both_are_equal(tmp_path, text, capsys):
    train(text, tmp_path, "--vocab-size", "300")
    capsys.readouterr()
    words = ["tokenizer", "convert", str(tmp_path / "a.model"), str(tmp_path / "hf"), "--check", text]
    assert main(words) == 0
    assert re.search(r"hf: the same ids as \S*a\.model on 1\d\d\d texts, \d+ tokens", capsys.readouterr().out)
    assert load_tokenizer(tmp_path / "hf").encode(TEXT) == load_tokenizer(tmp_path / "a.model").encode(TEXT)


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
