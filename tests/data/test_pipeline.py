import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import xxhash

from megatron_ru.batches.packed import read_packed
from megatron_ru.data import execution, pipeline
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run
from megatron_ru.data.sources import Source
from megatron_ru.data.steps import tokenise
from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.training import TokenizerSettings
from megatron_ru.tokenizer.training_hugging_face import train_hugging_face
from megatron_ru.tokens.indexed_dataset import IndexedDataset, check_dataset
from tests.data.conftest import outputs, write_corpus


def kept_texts(run):
    return [json.loads(line)["text"] for entry in run.files("texts", kind="shard") for line in entry["path"].open()]


def test_text_becomes_datasets(config_of, corpus, tokenizer_file):
    _, texts = corpus
    config = config_of()
    manifest = run_pipeline(config)
    run = Run.load(config.output)
    # The first of each text is kept, in order, when it is long enough.
    expected = [text for text in dict.fromkeys(texts) if len(text) >= 150]
    assert kept_texts(run) == expected
    steps = manifest["steps"]
    assert steps["read"]["counts"]["documents"] == len(texts)
    assert steps["texts"]["dropped"]["duplicate"] == len(texts) - len(set(texts))
    assert steps["texts"]["dropped"]["too_short"] == len(set(texts)) - len(expected)
    # Every token is in the blocks.
    tokenizer = load_tokenizer(tokenizer_file)
    encoded = [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(expected)]
    assert steps["pack"]["counts"]["tokens"] == sum(map(len, encoded)) == steps["tokenise"]["counts"]["tokens"]
    blocks = [np.fromfile(e["path"], e["dtype"]) for e in run.files("pack", kind="blocks")]
    ids = np.concatenate(blocks)
    assert np.array_equal(np.sort(ids[ids != 3]), np.sort(np.concatenate(encoded)))
    # Megatron's files, and what they are.
    train = check_dataset(f"{config.output}/train", tokenizer.vocab_size)
    assert (train.sequences, train.tokens) == (700, 700 * 64)
    packed = read_packed(f"{config.output}/train")
    assert (packed.block, packed.pad, packed.blocks, packed.kind) == (64, 3, 700, "lecture")
    dataset = IndexedDataset(f"{config.output}/train")
    assert packed.tokens == sum(int((dataset[n] != 3).sum()) for n in range(700))
    drawn = steps["mixture"]["counts"]
    assert drawn["samples_ru"] + drawn["samples_en"] == 700
    assert 430 < drawn["samples_ru"] < 550
    assert manifest["complete"]


def test_manifest_has_the_sums_of_the_files(config_of):
    config = config_of()
    manifest = run_pipeline(config)
    names = []
    for step, outcome in manifest["steps"].items():
        for entry in outcome["files"]:
            path = Run.load(config.output).step_folder(step) / entry["name"]
            assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == entry["xxh3_128"], path
            names.append(path.name)
    assert {"train.bin", "train.idx", "valid.bin", "valid.idx", "train.packed.json"} <= set(names)
    assert {"numpy", "megatron_ru"} <= manifest["versions"].keys()
    assert json.loads((Run.load(config.output).folder / "manifest.json").read_text()) == manifest


def test_held_out_documents_are_the_same_in_every_order(config_of, corpus, tokenizer_file):
    config = config_of(packing=None, mixture=None)
    manifest = run_pipeline(config)
    found = set()
    for domain in ("ru", "en"):
        dataset = IndexedDataset(f"{config.output}/{domain}_valid")
        found |= {tuple(dataset.document(n).tolist()) for n in range(dataset.documents)}
    assert len(found) == manifest["steps"]["tokenise"]["counts"]["documents_valid"]
    assert 3 < len(found) < 60
    # Another order, other shards.
    other = config_of("other", packing=None, mixture=None, inputs=[
        {"domain": "all", "files": ["corpus/en.jsonl", "corpus/ru_2.jsonl.gz", "corpus/ru_1.jsonl"]},
    ])  # fmt: skip
    run_pipeline(other)
    dataset = IndexedDataset(f"{other.output}/all_valid")
    assert {tuple(dataset.document(n).tolist()) for n in range(dataset.documents)} == found


@pytest.mark.parametrize("workers", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_outputs_do_not_depend_on_the_number_of_workers(config_of, workers):
    one, many = config_of("one"), config_of("many")
    run_pipeline(one)
    run_pipeline(many, workers)
    assert Run.load(one.output).outcome("read").counts["lines"] == 900
    assert len(list(Run.load(one.output).step_folder("read").glob("tasks/*.json"))) > 3
    assert outputs(Run.load(one.output).folder) == outputs(Run.load(many.output).folder)


def test_a_second_run_does_nothing_and_other_settings_what_they_must(config_of, monkeypatch):
    config = config_of()
    run_pipeline(config)
    ran = []
    run_task = execution.run_task
    monkeypatch.setattr(execution, "run_task", lambda f, name, task: ran.append(name) or run_task(f, name, task))
    run_pipeline(config)
    assert ran == []
    run_pipeline(config_of(mixture={"samples": 150, "samples_per_part": 100}))
    assert ran == ["mixture", "mixture", "publish", "publish"]
    assert check_dataset(f"{config.output}/train").sequences == 150
    ran.clear()
    # Without a mixture there is no train.bin any more.
    run_pipeline(config_of(mixture=None))
    assert set(ran) == {"publish"}
    assert not os.path.exists(f"{config.output}/train.bin")
    assert os.path.exists(f"{config.output}/ru_train.bin")


def test_a_lost_file_is_made_again(config_of):
    config = config_of()
    run_pipeline(config)
    run = Run.load(config.output)
    before = outputs(run.folder)
    lost = run.files("texts", kind="shard")[1]["path"]
    lost.write_bytes(lost.read_bytes()[:-10])
    run_pipeline(config)
    assert outputs(run.folder) == before


def test_what_was_finished_with_other_sums_is_kept(config_of, monkeypatch):
    config = config_of()
    run_pipeline(config)
    run = Run.load(config.output)
    steps = run.folder / "steps"
    # As an earlier version left it.
    for path in (*steps.glob("*/step.json"), *steps.glob("*/tasks/*.json")):
        path.write_text(path.read_text().replace('"xxh3_128"', '"sha256"'))
    Run._load.cache_clear()
    lost = run.files("texts", kind="shard")[1]["path"]
    lost.unlink()
    ran = []
    run_task = execution.run_task
    monkeypatch.setattr(
        execution, "run_task", lambda f, name, task: ran.append((name, task)) or run_task(f, name, task)
    )
    files = [entry for outcome in run_pipeline(config)["steps"].values() for entry in outcome["files"]]
    assert ran == [("texts", 1)]
    assert [entry["name"] for entry in files if "xxh3_128" in entry] == [lost.name]
    assert all(("xxh3_128" in entry) != ("sha256" in entry) for entry in files)


def test_changed_input_is_noticed(config_of, corpus):
    folder, _ = corpus
    config = config_of()
    first = run_pipeline(config)["steps"]["read"]["counts"]["documents"]
    with (folder / "en.jsonl").open("a") as stream:
        stream.write('{"text": "один новый документ"}\n')
    assert run_pipeline(config)["steps"]["read"]["counts"]["documents"] == first + 1


def test_stopping_behind_a_step(config_of):
    config = config_of()
    manifest = run_pipeline(config, until="texts")
    assert sorted(manifest["steps"]) == ["exact_dedup", "read", "texts"]
    assert not manifest["complete"]
    with pytest.raises(UserError, match=r"'packing' is no step of this pipeline; its steps: read, exact_dedup, texts"):
        run_pipeline(config, until="packing")


PROGRAM = [sys.executable, "-m", "megatron_ru", "data", "run"]


def start(path, workers=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*PROGRAM, str(path), "--workers", str(workers)], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_files(config_of, tmp_path, times):
    calm, shaken = config_of("calm"), config_of("shaken")
    run_pipeline(calm)
    generator = random.Random(times)
    for _ in range(times):
        process = start(tmp_path / "shaken.yaml")
        time.sleep(generator.uniform(0.3, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    run_pipeline(shaken)
    assert outputs(Run.load(shaken.output).folder) == outputs(Run.load(calm.output).folder)


def test_one_run_at_a_time_in_a_folder(config_of):
    config = config_of()
    with execution.locked(config.output), pytest.raises(UserError, match=r"another run \(process \d+ on .*\) works in"):
        run_pipeline(config)
    run_pipeline(config)


def test_a_dead_worker_is_told(config_of, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def end():\n"
        "    while 'megatron_ru.data.steps.texts' not in sys.modules: time.sleep(0.001)\n"
        "    os.kill(os.getpid(), 9)\n"
        "if '--multiprocessing-fork' in sys.argv: threading.Thread(target=end, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"a worker process died in the step .* it goes on where it was"):
        run_pipeline(config_of(), 2)


def test_full_disk(config_of, monkeypatch):
    import errno

    config = config_of()
    run_pipeline(config, until="exact_dedup")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_ru.data.outcome.HashedStream.write", full)
        with pytest.raises(UserError, match=r"no space is left for .*; what is finished is kept"):
            run_pipeline(config)
    manifest = run_pipeline(config)
    assert manifest["complete"]
    assert not list(Run.load(config.output).folder.rglob("*.partial"))


def test_ranges_of_a_plain_file_share_its_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b"\xef\xbb\xbf" + b"first\n", b"\n", b"x" * 50 + b"\n", b"second\r\n", b"last"]
    path.write_bytes(b"".join(lines))
    size = path.stat().st_size
    for pieces in range(1, size + 1):
        bounds = [size * n // pieces for n in range(pieces + 1)]
        sources = [
            Source(domain="d", file=str(path), start=a, end=b, plain=True, any_language=False)
            for a, b in pairwise(bounds)
        ]
        found = [(source.place(number), line) for source in sources for number, line in source.lines()]
        assert found == [
            (f"{path}:{n}", line.removeprefix(b"\xef\xbb\xbf")) for n, line in enumerate(lines, start=1)
        ]  # fmt: skip


def test_write_corpus_is_the_same_every_time(tmp_path):
    assert write_corpus(tmp_path / "a", 5) == write_corpus(tmp_path / "b", 5)


def test_a_shard_in_which_the_fast_encoder_differs_is_encoded_again(config_of, monkeypatch):
    """What came before the first difference cannot be trusted either."""
    from megatron_ru.data.steps import tokenise

    config = config_of(packing=None, mixture=None)
    right = run_pipeline(config)["steps"]["tokenise"]["counts"]
    real, begun = tokenise._with_ends, []

    def wrong_until_noticed(encoder, texts):
        begun.append(len(texts))
        ids, lengths = real(encoder, texts)
        if len(begun) == 1:
            encoder.counts.differed += 1
            return np.zeros_like(ids), lengths
        return ids, lengths

    run = Run.load(config.output)
    before = {entry["path"].name: entry["path"].read_bytes() for entry in run.files("tokenise")}
    monkeypatch.setattr(tokenise, "_with_ends", wrong_until_noticed)
    tokenise.tokenizer_of.cache_clear()
    outcome = tokenise._run(run, 0)
    tokenise.tokenizer_of.cache_clear()
    assert len(begun) % 2 == 0
    assert {entry["path"].name: entry["path"].read_bytes() for entry in run.files("tokenise")} == before
    assert 0 < outcome.counts["documents"] <= right["documents"]


def test_workers_have_one_thread_each_and_this_process_keeps_its_own(config_of, monkeypatch):
    """What one process does alone, k-means, is not slowed down by a step before it that had workers."""
    from megatron_ru.data import execution

    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    with execution._one_thread_each():
        assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("1", "3")
    run_pipeline(config_of(tokens=None, packing=None, mixture=None), 2, until="read")
    assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b'{"key": 1}'])
def test_damaged_notes_are_no_notes(config_of, damage):
    """A marker, a sum or a key that a failing disk emptied: what it spoke of is made again."""
    config = config_of(mixture=None, packing=None, tokens=None)
    run_pipeline(config)
    made = outputs(run_folder := Run.load(config.output).folder)
    for name in ("steps/read/step.json", "steps/read/tasks/000000.json", "steps/texts/key", "manifest.json"):
        (run_folder / name).write_bytes(damage)
    assert run_pipeline(config)["complete"]
    assert outputs(run_folder) == made
    # And where all of it is to go.
    (run_folder / "steps/read/tasks/000000.json").write_bytes(damage)
    assert run_pipeline(config_of(mixture=None, packing=None, tokens=None, malformed="skip"))["complete"]


def test_a_full_disk_behind_the_tasks(config_of, monkeypatch):
    """The sum of a step and the manifest are written by this process, outside of tasks."""
    config = config_of(mixture=None, packing=None, tokens=None)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((Run, "close"), (pipeline, "write_manifest")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(UserError, match=r"no space is left for .* run the same command again"):
                run_pipeline(config)
    assert run_pipeline(config)["complete"]


def test_other_ends_of_documents_beside_the_same_tokenizer_are_noticed(config_of, tmp_path):
    folder = tmp_path / "hf"
    train_hugging_face(["мама мыла раму " * 40] * 9, folder, TokenizerSettings(vocab_size=262))
    config = config_of(tokens={"tokenizer": str(folder)}, packing=None, mixture=None)
    run_pipeline(config)
    assert IndexedDataset(f"{config.output}/ru_train")[0][-1] == 2
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<s>"}))
    # Another run is another process.
    tokenise.tokenizer_of.cache_clear()
    run_pipeline(config)
    assert IndexedDataset(f"{config.output}/ru_train")[0][-1] == 1


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"pad_token": "</s>"}, "uses the id 2 both to pad and to end documents"),
        ({"pad_token": "м"}, "pads with 'м', which is also a piece of text"),
        ({"eos_token": "<none>"}, "has no end-of-sequence token"),
    ],
)
def test_a_tokenizer_that_will_not_do_is_refused_before_the_work(config_of, tmp_path, roles, message):
    folder = tmp_path / "t"
    folder.mkdir()
    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2, "м": 3}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    added = [
        {"id": n, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for word, n in vocabulary.items() if n < 3
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"} | roles))
    config = config_of(tokens={"tokenizer": str(folder)}, mixture=None)
    with pytest.raises(UserError, match=message):
        run_pipeline(config)
    assert not (tmp_path / "out/steps").exists()


def test_tokens_that_stand_for_what_is_unknown_are_counted(config_of, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    words = {"<unk>": 0, "</s>": 1, "one": 2, ".": 3}
    added = [
        {"id": n, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for word, n in words.items() if n < 2
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    description = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "one.jsonl").write_text('{"text": "one two. one three."}\n')
    changes = {"packing": None, "mixture": None, "length": {"at_least": 0}}
    config = config_of(inputs=[{"domain": "d", "files": ["one.jsonl"]}], tokens={"tokenizer": str(folder)}, **changes)
    assert run_pipeline(config)["steps"]["tokenise"]["counts"]["unknown_tokens"] == 2
