"""Nothing is lost in silence: what is no document is refused or counted, with its file and line."""

import gzip
import json
import os
import resource
import subprocess
import sys

import pytest

from megatron_ru.data.config import Input, PipelineConfig
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run
from megatron_ru.foundation.errors import UserError

GOOD = json.dumps({"text": "хороший документ"}, ensure_ascii=False).encode()
BAD = {
    "broken JSON": (b'{"text": "cut', "not JSON"),
    "invalid UTF-8": (b'{"text": "\xd0\xff"}', "not UTF-8: byte 0x"),
    "raw NUL": (b'{"text": "a\x00b"}', "not JSON"),
    "no text": (b'{"body": "x"}', "no field 'text' (its fields: 'body')"),
    "text that is none": (b'{"text": 5}', "field 'text' should be a string, found a number"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', ""),
    "an array": (b'["text"]', "expected a JSON object, found an array"),
    "a string": (b'"text"', "expected a JSON object, found a string"),
}


def config(folder, *files, **changes):
    inputs = (Input(domain="d", files=tuple(map(str, files))),)
    return PipelineConfig(**{"output": str(folder / "out"), "inputs": inputs, "length": None} | changes)


def texts(folder):
    run = Run.load(folder / "out")
    return [json.loads(line)["text"] for entry in run.files("texts", kind="shard") for line in entry["path"].open("rb")]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_malformed_lines_are_refused_or_counted(tmp_path, name, suffix):
    line, reason = BAD[name]
    content = b"\n".join([GOOD, b"", line, GOOD.replace("хороший".encode(), b"other"), b""])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(UserError) as refused:
        run_pipeline(config(tmp_path, path))
    assert str(refused.value).startswith(f"{path}:3: {reason}")
    assert "set malformed: skip" in str(refused.value)
    manifest = run_pipeline(config(tmp_path, path, malformed="skip"))
    read = manifest["steps"]["read"]
    assert read["dropped"] == {"malformed": 1}
    assert read["samples"][0]["place"] == f"{path}:3"
    assert read["counts"]["documents"] == 2
    assert texts(tmp_path) == ["хороший документ", "other документ"]


def test_empty_texts_and_nul_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n{"text": "a\\u0000b"}\n{"text": ""}')
    manifest = run_pipeline(config(tmp_path, path))
    assert texts(tmp_path) == ["", "a\0b"]
    assert manifest["steps"]["read"]["counts"]["documents_with_nul"] == 1
    assert manifest["steps"]["texts"]["dropped"] == {"duplicate": 1}


def test_an_empty_file_is_no_error_and_no_files_are(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert run_pipeline(config(tmp_path, tmp_path / "a.jsonl"))["steps"]["read"]["counts"]["documents"] == 0
    with pytest.raises(UserError, match=r"no file matches .*b\*.jsonl"):
        run_pipeline(config(tmp_path, tmp_path / "b*.jsonl"))
    with pytest.raises(UserError, match=r"named twice"):
        run_pipeline(config(tmp_path, tmp_path / "a.jsonl", tmp_path / "*.jsonl"))


def test_half_a_gzip_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + b"\n") * 5000)[:-20])
    with pytest.raises(UserError, match=r"a.jsonl.gz is cut off: .* get it again"):
        run_pipeline(config(tmp_path, path, malformed="skip"))


def test_lines_are_copied_as_they_are(tmp_path):
    """Fields, spelling and order of keys are not touched; a missing last line break is added."""
    lines = [b'{"b": 1.50, "text": "\\u0430", "a": [1]}', b'{ "text":"b" }']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    run_pipeline(config(tmp_path, path))
    (entry,) = Run.load(tmp_path / "out").files("texts", kind="shard")
    assert entry["path"].read_bytes() == b"\n".join([*lines, b""])


def test_forms_of_letters_are_different_texts(tmp_path):
    """й in two forms, е and ё: nobody is normalised in secret."""
    words = ["\u0439", "\u0438\u0306", "е", "ё", "👩‍👩‍👧", "שלום", "é", "e\u0301"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in [*words, *words]), encoding="utf-8")
    run_pipeline(config(tmp_path, path))
    assert texts(tmp_path) == words


@pytest.mark.slow
def test_a_line_of_100_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        for line in (b'{"text": "first"}', b'{"text": "' + b"x" * 100_000_000 + b'"}', b'{"text": "last"}'):
            stream.write(line + b"\n")
    run_pipeline(config(tmp_path, path, shard_megabytes=8), 2)
    assert [len(text) for text in texts(tmp_path)] == [5, 100_000_000, 4]


@pytest.mark.slow
def test_a_corpus_five_times_larger_than_memory(tmp_path):
    """200 MB of address space for data beside what the interpreter has, a corpus of 1.1 GB."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        for number in range(300_000):
            line = b'{"text": "%d %s"}\n' % (number % 222_000, b"text " * 740)
            stream.write(line)
    assert path.stat().st_size > 1.1e9
    program = [sys.executable, "-m", "megatron_ru", "data", "dedup", "--input", str(path), "--output",
               str(tmp_path / "out"), "--workers", "1"]  # fmt: skip

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (220 << 20, 220 << 20))

    shown = subprocess.run(
        program, preexec_fn=limit, capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    assert shown.returncode == 0, shown.stderr
    assert "texts: " in shown.stdout
    assert "222000 documents; dropped: 78000 duplicate" in shown.stdout
