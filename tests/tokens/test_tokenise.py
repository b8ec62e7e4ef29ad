import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import MalformedLines
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokens import tokenise as module
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
    tokenizer = load_tokenizer(model)
    tokenizer.eod = None
    monkeypatch.setattr(module, "load_tokenizer", lambda path: tokenizer)
    with pytest.raises(UserError, match=r"has no end-of-sequence token .*--no-append-eod"):
        tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings())
    tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings(append_eod=False))


def test_a_document_on_which_the_tokenizer_fails_is_named(tmp_path, model, jsonl_files, texts, monkeypatch):
    class Picky:
        vocab_size, eod, path = 320, 2, "picky.json"

        def encode(self, text):
            if text == texts[104]:
                raise BaseException("panicked")
            return [1]

        def encode_batch(self, batch):
            return [self.encode(text) for text in batch]

    monkeypatch.setattr(module, "load_tokenizer", lambda path: Picky())
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
    tokenizer = load_tokenizer(model)
    tokenizer.vocab_size = 65_500
    monkeypatch.setattr(module, "load_tokenizer", lambda path: tokenizer)
    assert tokenise(jsonl_files, model, tmp_path / "ru", TokeniseSettings()).dtype == "int32"
    assert IndexedDataset(tmp_path / "ru")[0].dtype == np.int32


def test_there_is_at_least_one_worker():
    with pytest.raises(UserError, match="the number of workers is 0; it must be at least 1"):
        TokeniseSettings(workers=0)
