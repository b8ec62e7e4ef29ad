import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.lock import sole_writer
from megatron_ru.text.jsonl import MalformedLines
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer
from megatron_ru.tokens import tokenise as module
from megatron_ru.tokens.encoding import Encoder, load_encoder
from megatron_ru.tokens.indexed_dataset import IndexedDataset, check_dataset
from megatron_ru.tokens.tokenise import TokeniseSettings, tokenise


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    # About ten documents, so that a small text keeps several workers busy.
    monkeypatch.setattr(module, "_BATCH_BYTES", 2000)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_documents_are_encoded_in_order_and_ended(tmp_path, model, jsonl_files, texts):
    summary = tokenise(jsonl_files, model, tmp_path / "out" / "ru", TokeniseSettings())
    tokenizer = load_tokenizer(model)
    expected = [[*ids, 2] if (ids := tokenizer.encode(text)) else [] for text in texts]
    dataset = IndexedDataset(tmp_path / "out" / "ru")
    assert [dataset.document(number).tolist() for number in range(dataset.documents)] == expected
    assert summary.documents == len(texts)
    assert summary.tokens == sum(map(len, expected)) == check_dataset(tmp_path / "out" / "ru", 320).tokens
    assert summary.text_bytes == sum(os.path.getsize(file) for file in jsonl_files)
    assert (summary.dtype, summary.malformed) == ("uint16", 0)


def test_without_end_tokens_documents_are_only_text(tmp_path, model, jsonl_files, texts):
    tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings(append_eod=False))
    dataset = IndexedDataset(tmp_path / "ru")
    assert dataset.document(0).tolist() == load_tokenizer(model).encode(texts[0])


def test_the_files_are_those_that_megatron_writes(tmp_path, model, jsonl_files, texts):
    """The steps of Megatron-LM's tools/preprocess_data.py --append-eod, through Megatron's classes."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(model)
    dtype = theirs.DType.optimal_dtype(tokenizer.vocab_size)
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in texts:
        ids = tokenizer.text_to_ids(text)
        if ids:
            ids.append(tokenizer.eos_id)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    tokenise(jsonl_files, model, tmp_path / "ours", TokeniseSettings())
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(tmp_path, model, jsonl_files, workers):
    one = tokenise(jsonl_files, model, tmp_path / "one" / "ru", TokeniseSettings())
    more = tokenise(jsonl_files, model, tmp_path / "more" / "ru", TokeniseSettings(workers=workers))
    assert contents(tmp_path / "more") == contents(tmp_path / "one")
    assert (more.documents, more.tokens) == (one.documents, one.tokens)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_adds_up_to_the_size_of_the_files(tmp_path, model, jsonl_files, workers):
    steps: list[int] = []
    tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings(workers=workers), progress=steps.append)
    assert sum(steps) == sum(os.path.getsize(file) for file in jsonl_files)
    assert len(steps) > 5


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_lines_stop_or_are_reported_in_order(tmp_path, model, jsonl_files, workers):
    with open(jsonl_files[1], "a") as stream:
        stream.write('{"body": 1}\nnonsense\n')
    out, settings = tmp_path / "out", TokeniseSettings(workers=workers)
    with pytest.raises(UserError, match=r"b\.jsonl:201: no field 'text' .*--skip-malformed"):
        tokenise(jsonl_files, model, out / "ru", settings)
    assert contents(out) == {}
    reports: list[str] = []
    malformed = MalformedLines(skip=True, report=reports.append)
    summary = tokenise(jsonl_files, model, out / "ru", settings, malformed=malformed)
    assert (summary.documents, summary.malformed) == (300, 2)
    assert [report.split(": ")[0] for report in reports] == [f"{jsonl_files[1]}:201", f"{jsonl_files[1]}:202"]


def test_inputs_are_looked_at_before_anything_is_done(tmp_path, model, jsonl_files):
    with pytest.raises(UserError, match=r"cannot read \S*absent\.jsonl"):
        tokenise([*jsonl_files, tmp_path / "absent.jsonl"], model, tmp_path / "out" / "ru", TokeniseSettings())
    assert not (tmp_path / "out").exists()


def test_an_empty_dataset_is_an_error(tmp_path, model):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"no document with a token in \S*a\.jsonl"):
        tokenise([tmp_path / "a.jsonl"], model, tmp_path / "out" / "ru", TokeniseSettings())
    assert contents(tmp_path / "out") == {}


def test_a_tokenizer_without_an_end_token_cannot_end_documents(tmp_path, model, jsonl_files, monkeypatch):
    encoder = load_encoder(model)
    encoder.eos = None
    monkeypatch.setattr(module, "load_encoder", lambda path, **_: encoder)
    with pytest.raises(UserError, match=r"has no end-of-sequence token .*--no-append-eod"):
        tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings())
    tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings(append_eod=False))


def test_a_document_on_which_the_tokenizer_fails_is_named(tmp_path, model, jsonl_files, texts, monkeypatch):
    class Picky:
        vocab_size, eod, pad, path = 320, 2, None, "picky.json"

        def encode(self, text):
            if text == texts[104]:
                raise BaseException("panicked")
            return [1]

        def encode_batch(self, batch):
            return [self.encode(text) for text in batch]

    monkeypatch.setattr(module, "load_encoder", lambda path, **_: Encoder(Picky()))
    with pytest.raises(UserError, match=r"b\.jsonl:5: the tokenizer picky\.json fails on .*panicked"):
        tokenise(jsonl_files, model, tmp_path / "out" / "ru", TokeniseSettings())
    assert contents(tmp_path / "out") == {}


def test_a_killed_worker_ends_the_run_with_nothing_left(tmp_path, model, jsonl_files):
    def kill_one(_):
        children = multiprocessing.active_children()
        if children:
            os.kill(children[0].pid, signal.SIGKILL)
            children[0].join()

    with pytest.raises(UserError, match=r"a worker process died .* fewer --workers than 2"):
        tokenise(jsonl_files * 5, model, tmp_path / "out" / "ru", TokeniseSettings(workers=2), progress=kill_one)
    assert contents(tmp_path / "out") == {}
    assert multiprocessing.active_children() == []


# Runs the real thing with a limit on the size of files, which the kernel enforces as it does a full disk.
LIMITED = """
import resource, sys
from megatron_ru.commands.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_write_that_fails_is_one_sentence(tmp_path, model, jsonl_files, workers):
    words = ["data", "tokenize", "--input", *jsonl_files * 100, "--tokenizer", model]
    words += ["--output", str(tmp_path / "out" / "ru"), "--workers", str(workers)]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == (
        f"megatron-ru: error: cannot write {tmp_path}/out/ru.bin: File too large; nothing was kept\n"
    )
    assert contents(tmp_path / "out") == {}


def test_workers_end_when_their_parent_is_killed(tmp_path, model):
    # 48 MB: far more than two workers finish before they are found.
    source = tmp_path / "a.jsonl"
    line = json.dumps({"text": "кошка " * 40_000}) + "\n"
    source.write_text(line * 100)
    words = ["-m", "megatron_ru", "data", "tokenize", "--input", str(source), "--tokenizer", model]
    words += ["--output", str(tmp_path / "ru"), "--workers", "2"]
    parent = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    try:
        workers = _wait_for(lambda: _workers_of(parent.pid), "two workers", enough=2)
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: [pid for pid in workers if not _alive(pid)], "both to end", enough=2)
    assert not (tmp_path / "ru.bin").exists()


def _workers_of(parent: int) -> list[int]:
    import psutil

    children = psutil.Process(parent).children()
    return [child.pid for child in children if any("spawn_main" in word for word in child.cmdline())]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _wait_for(look, what: str, enough: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(found := look()) >= enough:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def test_a_large_vocabulary_takes_four_bytes(tmp_path, model, jsonl_files, monkeypatch):
    encoder = load_encoder(model)
    encoder.vocabulary_size, encoder.dtype = 65_500, np.dtype(np.int32)
    monkeypatch.setattr(module, "load_encoder", lambda path, **_: encoder)
    assert tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings()).dtype == "int32"
    assert IndexedDataset(tmp_path / "ru")[0].dtype == np.int32


def test_there_is_at_least_one_worker():
    with pytest.raises(UserError, match="the number of workers is 0; it must be at least 1"):
        TokeniseSettings(workers=0)


class Wrong:
    """A fast engine that errs from one document on."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode_flat(self, texts):
        found = [[*self.tokenizer.encode(text), *([5] if "собака" in text else [])] for text in texts]
        return np.array([token for ids in found for token in ids], np.uint32), np.array(list(map(len, found)), np.int32)


def test_a_fast_encoder_that_errs_is_replaced_from_the_beginning(tmp_path, model, jsonl_files, texts, monkeypatch):
    """What was written before the difference was found is written again."""
    with open(jsonl_files[0], "a") as stream:
        stream.write("nonsense\n")
    expected = tokenise(
        jsonl_files, model, tmp_path / "slow", TokeniseSettings(fast=False),
        malformed=MalformedLines(skip=True, report=lambda _: None),
    )  # fmt: skip
    tokenizer = load_tokenizer(model)
    monkeypatch.setattr("megatron_ru.tokens.encoding.fast_engine", lambda _: (Wrong(tokenizer), ""))
    # Checked is one document late in the second file.
    checked = [text for text in texts[150:] if "собака" in text][-1]
    monkeypatch.setattr("megatron_ru.tokens.encoding._is_checked", lambda piece: piece == checked)
    reports: list[str] = []
    steps: list[int] = []
    found = tokenise(
        jsonl_files, model, tmp_path / "out", TokeniseSettings(),
        malformed=MalformedLines(skip=True, report=reports.append), progress=steps.append,
    )  # fmt: skip
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"slow{suffix}").read_bytes()
    assert (found.tokens, found.malformed) == (expected.tokens, 1)
    assert [report for report in reports if "nonsense" not in report and "not JSON" not in report] == [reports[1]]
    assert "a.jsonl:101: not JSON" in reports[0]
    assert reports[1].endswith("the run begins again without the fast encoder")
    assert sum(steps) == sum(os.path.getsize(file) for file in jsonl_files)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_fast_encoder_changes_no_byte_and_says_what_it_did(tmp_path, model, jsonl_files, workers):
    pytest.importorskip("fastokens")
    letters = "".join(map(chr, range(32, 127)))
    with open(jsonl_files[0], "a") as stream:
        stream.write(json.dumps({"text": letters}) + "\n")
    big = tmp_path / "big.model"
    train_tokenizer([letters] * 300 + ["кошка и собака"] * 300, big, TokenizerSettings(vocab_size=390))
    slow = tokenise(jsonl_files, big, tmp_path / "slow", TokeniseSettings(fast=False))
    fast = tokenise(jsonl_files, big, tmp_path / "fast", TokeniseSettings(workers=workers))
    assert (slow.slow_reason, fast.slow_reason) == ("fast encoding is switched off", "")
    assert fast.encoder.pieces == fast.documents
    assert fast.encoder.differed == fast.encoder.raised == slow.encoder.checked == 0
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"fast{suffix}").read_bytes() == (tmp_path / f"slow{suffix}").read_bytes()


def test_compressed_and_parquet_inputs_give_the_same_dataset(tmp_path, model, jsonl_files):
    arrow, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    import pyarrow.parquet

    folder = tmp_path / "other"
    folder.mkdir()
    first, second = (Path(file).read_bytes() for file in jsonl_files)
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(first))
    rows = [json.loads(line)["text"] for line in second.splitlines()]
    pyarrow.parquet.write_table(arrow.table({"text": rows, "n": list(range(len(rows)))}), folder / "b.parquet")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(second))
    plain = tokenise(jsonl_files, model, tmp_path / "plain", TokeniseSettings())
    for kind in ("parquet", "jsonl.gz"):
        found = tokenise([folder / "a.jsonl.zst", folder / f"b.{kind}"], model, tmp_path / kind, TokeniseSettings())
        assert (found.documents, found.tokens) == (plain.documents, plain.tokens)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"{kind}{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()


BAD_LINES = [
    (b'{"text": "a"', "not JSON"),
    (b'{"text": "\xff\xfe"}', "not UTF-8: byte 0xff at column 11"),
    (b'{"text": "a\0b"}', "not JSON"),
    (b'{"text": "\\ud800"}', ""),
    (b'["text"]', "expected a JSON object, found an array"),
    (b'{"text": null}', "field 'text' should be a string, found null"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_each_bad_line_is_refused_or_counted_with_its_place_and_costs_no_other(
    tmp_path, model, jsonl_files, line, reason
):
    good = Path(jsonl_files[0]).read_bytes()
    (tmp_path / "bad.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(UserError, match=rf"bad\.jsonl:101: {re.escape(reason)}"):
        tokenise([tmp_path / "bad.jsonl"], model, tmp_path / "out" / "ru", TokeniseSettings())
    assert contents(tmp_path / "out") == {}
    reports: list[str] = []
    malformed = MalformedLines(skip=True, report=reports.append)
    found = tokenise([tmp_path / "bad.jsonl"], model, tmp_path / "skip", TokeniseSettings(), malformed=malformed)
    (tmp_path / "good.jsonl").write_bytes(good + good)
    tokenise([tmp_path / "good.jsonl"], model, tmp_path / "good", TokeniseSettings())
    assert (found.documents, found.malformed, len(reports)) == (200, 1, 1)
    assert (tmp_path / "skip.bin").read_bytes() == (tmp_path / "good.bin").read_bytes()


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_half_written_archive_is_refused(tmp_path, model, jsonl_files, kind):
    raw = Path(jsonl_files[1]).read_bytes()
    if kind == ".gz":
        packed = gzip.compress(raw)
    else:
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress(raw)
    half = tmp_path / f"half.jsonl{kind}"
    half.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"half\.jsonl\S* is cut off: .*; get it again"):
        tokenise([half], model, tmp_path / "out" / "ru", TokeniseSettings())
    assert contents(tmp_path / "out") == {}


def test_two_runs_into_one_dataset_do_not_mix(tmp_path, model, jsonl_files):
    with (
        sole_writer(tmp_path / "ru", "the dataset"),
        pytest.raises(UserError, match=r"another process is writing the dataset \S*ru; wait for it"),
    ):
        tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings())
    tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings())


@pytest.mark.slow
def test_one_document_of_a_hundred_megabytes(tmp_path, model):
    """In at most 900 MB, most of which is the line itself: as bytes, as text, and as the copy that a worker gets."""
    source = tmp_path / "a.jsonl"
    sentence = "кошка собака 2024 медведь\n"
    with source.open("w", encoding="utf-8") as stream:
        stream.write('{"text": "x"}\n')
        stream.write(json.dumps({"text": sentence * 2_300_000}, ensure_ascii=False) + "\n")
        stream.write('{"text": "y"}\n')
    assert source.stat().st_size > 100_000_000
    words = ["-m", "megatron_ru", "data", "tokenize", "--input", str(source), "--tokenizer", model]
    process = subprocess.Popen([sys.executable, *words, "--output", str(tmp_path / "ru"), "--workers", "2"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 900_000
    dataset = IndexedDataset(tmp_path / "ru")
    assert dataset.documents == 3
    ids = dataset.document(1)
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(ids[:1000].tolist()) == (sentence * 1000)[: len(tokenizer.decode(ids[:1000].tolist()))]
    one = len(tokenizer.encode(sentence * 11)) - len(tokenizer.encode(sentence * 10))
    assert len(ids) == len(tokenizer.encode(sentence * 10)) + one * (2_300_000 - 10) + 1


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path, model):
    """Twenty runs are killed; each leaves the old dataset or the new one whole, and the next run clears up."""
    source = tmp_path / "a.jsonl"
    generator = random.Random(7)
    words = ["кошка", "собака", "2024", "data", "река"]
    with source.open("w", encoding="utf-8") as stream:
        for _ in range(60_000):
            stream.write(json.dumps({"text": " ".join(generator.choices(words, k=60))}, ensure_ascii=False) + "\n")
    command = [sys.executable, "-m", "megatron_ru", "data", "tokenize", "--input", str(source), "--tokenizer", model]
    expected = tmp_path / "expected" / "ru"
    started = time.monotonic()
    subprocess.run([*command, "--output", str(expected), "--workers", "2"], check=True, capture_output=True)
    seconds = time.monotonic() - started
    out = tmp_path / "out"
    for _ in range(20):
        run = subprocess.Popen(
            [*command, "--output", str(out / "ru"), "--workers", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(generator.uniform(0, 1.1 * seconds))
        run.kill()
        run.wait()
        if (out / "ru.idx").exists():
            assert (out / "ru.bin").read_bytes() == expected.with_suffix(".bin").read_bytes()
            assert check_dataset(out / "ru", 320).documents == 60_000
    subprocess.run([*command, "--output", str(out / "ru"), "--workers", "2"], check=True, capture_output=True)
    assert contents(out) == contents(expected.parent)
