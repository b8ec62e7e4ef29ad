"""Near-duplicates planted among real Russian text are found, and of each pair the farther one stays."""

import json
import random
import zlib

import numpy as np
import pytest

from megatron_ru.data.config import Input, PipelineConfig, SemanticDedup
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run
from megatron_ru.foundation.errors import UserError
from megatron_ru.text.wordnet import wordnet_documents
from tests.data.conftest import outputs

pytest.importorskip("faiss", reason="k-means is faiss's")

DOCUMENTS, PLANTED = 1500, 150


def embed(texts, dimension=256):
    """Hashed groups of four letters, weighted by rarity, projected at random: no network and no model."""
    size = 1 << 13
    counts = np.zeros((len(texts), size), dtype=np.float32)
    for row, text in enumerate(texts):
        for start in range(min(len(text), 600) - 3):
            counts[row, zlib.crc32(text[start : start + 4].encode()) % size] += 1
    weights = np.log(len(texts) / (1 + (counts > 0).sum(axis=0)))
    projection = np.random.default_rng(1).standard_normal((size, dimension)).astype(np.float32)
    return (np.log1p(counts) * weights.astype(np.float32)) @ projection


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder with text.jsonl and vectors.npy, the number of the original of each document or -1)."""
    folder = tmp_path_factory.mktemp("planted")
    texts = []
    for document in wordnet_documents():
        if len(document.text) >= 200:
            texts.append(document.text)
        if len(texts) == DOCUMENTS:
            break
    generator = random.Random(5)
    originals = generator.sample(range(DOCUMENTS), PLANTED)
    entries = [(text, -1, number) for number, text in enumerate(texts)]
    for number in originals:
        words = texts[number].split(" ")
        # One word in thirty is dropped, one doubled.
        for _ in range(max(1, len(words) // 30)):
            del words[generator.randrange(len(words))]
            words.insert(generator.randrange(len(words)), generator.choice(words))
        entries.append((" ".join(words), number, -1))
    generator.shuffle(entries)
    place = {number: row for row, (_, _, number) in enumerate(entries) if number >= 0}
    original = np.array([place[of] if of >= 0 else -1 for _, of, _ in entries])
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        for text, _, _ in entries:
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    np.save(folder / "vectors.npy", embed([text for text, _, _ in entries]))
    return folder, original


def config(folder, output, **changes):
    settings = {"embeddings": str(folder / "vectors.npy"), "clusters": 20, "remove": PLANTED / (DOCUMENTS + PLANTED)}
    return PipelineConfig(
        output=str(output), inputs=(Input(domain="ru", files=(str(folder / "text.jsonl"),)),), shard_megabytes=0.5,
        length=None, exact_dedup=False, semantic_dedup=SemanticDedup(**settings | changes),
    )  # fmt: skip


def test_planted_pairs_are_found(planted, tmp_path):
    folder, original = planted
    manifest = run_pipeline(config(folder, tmp_path / "out"))
    run = Run.load(tmp_path / "out")
    kept = {line for entry in run.files("semantic_dedup", kind="shard") for line in entry["path"].open()}
    removed = np.array([line not in kept for line in (folder / "text.jsonl").open()])
    copies = np.flatnonzero(original >= 0)
    pairs_found = removed[copies] | removed[original[copies]]
    recall = pairs_found.mean()
    precision = pairs_found.sum() / removed.sum()
    assert (precision >= 0.95, recall >= 0.95) == (True, True), (precision, recall)
    dropped = manifest["steps"]["semantic_dedup"]
    assert dropped["dropped"]["alike"] == removed.sum() == PLANTED
    assert dropped["counts"]["documents"] == DOCUMENTS
    assert dropped["samples"][0]["text"].startswith("cosine 0.9")


def test_workers_and_slices_do_not_matter(planted, tmp_path, monkeypatch):
    folder, _ = planted
    run_pipeline(config(folder, tmp_path / "one"))
    monkeypatch.setattr("megatron_ru.data.semantic._PRODUCT_ELEMENTS", 5000)
    run_pipeline(config(folder, tmp_path / "many"), until="neighbours")
    run_pipeline(config(folder, tmp_path / "many"), 2)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "many")


def test_torch_and_numpy_leave_the_same_files(planted, tmp_path):
    """A GPU differs from this in nothing but the name of the device."""
    folder, _ = planted
    found = []
    for name, device in (("numpy", "cpu"), ("torch", "cpu:0")):
        run_pipeline(config(folder, tmp_path / name, device=device))
        run = Run.load(tmp_path / name)
        steps = ("assign", "neighbours", "threshold", "semantic_dedup")
        found.append([entry["xxh3_128"] for step in steps for entry in run.files(step)])
    assert found[0] == found[1]


def test_another_target_keeps_the_clusters(planted, tmp_path, monkeypatch):
    from megatron_ru.data import execution

    folder, _ = planted
    run_pipeline(config(folder, tmp_path / "out"))
    ran = set()
    run_task = execution.run_task
    monkeypatch.setattr(execution, "run_task", lambda f, name, task: ran.add(name) or run_task(f, name, task))
    manifest = run_pipeline(config(folder, tmp_path / "out", remove=0.3))
    assert ran == {"threshold", "semantic_dedup"}
    total = DOCUMENTS + PLANTED
    assert manifest["steps"]["semantic_dedup"]["dropped"]["alike"] == round(0.3 * total)
    manifest = run_pipeline(config(folder, tmp_path / "out", threshold=2.0))
    assert manifest["steps"]["semantic_dedup"]["counts"]["documents"] == total


def test_embeddings_of_other_documents_are_refused(planted, tmp_path):
    folder, _ = planted
    np.save(tmp_path / "few.npy", np.zeros((10, 8)))
    with pytest.raises(UserError, match=r"few.npy has the shape \[10, 8\], expected \[1650, dimension\]"):
        run_pipeline(config(folder, tmp_path / "out", embeddings=str(tmp_path / "few.npy")))
    with pytest.raises(UserError, match="clusters is 9999, more than the 1650 documents"):
        run_pipeline(config(folder, tmp_path / "out", clusters=9999))


def test_either_an_encoder_or_embeddings():
    for wrong in ({}, {"encoder": "a", "embeddings": "b"}):
        with pytest.raises(UserError, match="needs either encoder, a folder, or embeddings"):
            SemanticDedup(**wrong)
    with pytest.raises(UserError, match=r"semantic_dedup.remove is 1.5; it must lie in \[0, 1\)"):
        SemanticDedup(encoder="a", remove=1.5)


@pytest.mark.slow
def test_clusters_by_density_keep_their_noise(planted, tmp_path):
    pytest.importorskip("umap")
    pytest.importorskip("fast_hdbscan")
    folder, original = planted
    manifest = run_pipeline(config(folder, tmp_path / "out", clustering="hdbscan", clusters=12, remove=0.02))
    counts = manifest["steps"]["centroids"]["counts"]
    assert 1 <= counts["clusters"] <= 24
    assert 0 < counts["noise"] < 0.6 * (DOCUMENTS + PLANTED)
    assert counts["sample"] == DOCUMENTS + PLANTED
    noise = np.load(Run.load(tmp_path / "out").files("centroids", kind="labels")[0]["path"]) < 0
    run = Run.load(tmp_path / "out")
    kept = {line for entry in run.files("semantic_dedup", kind="shard") for line in entry["path"].open()}
    removed = np.array([line not in kept for line in (folder / "text.jsonl").open()])
    assert not np.any(removed & noise)
    assert removed.sum() == round(0.02 * (DOCUMENTS + PLANTED))
    # What goes is a planted copy or its original.
    pair = original >= 0
    pair[original[pair]] = True
    assert pair[removed].mean() > 0.9


@pytest.mark.slow
def test_a_model_in_a_folder_embeds(planted, tmp_path):
    """A tiny BERT with random weights and one pooling layer, saved as sentence-transformers saves models."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    base = tmp_path / "bert"
    base.mkdir()
    letters = sorted(
        {letter for line in (planted[0] / "text.jsonl").open() for letter in line.lower() if not letter.isspace()}
    )
    (base / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)])
    )
    tokenizer = BertTokenizerFast(str(base / "vocab.txt"))
    tokenizer.save_pretrained(base)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=128)).save_pretrained(base)  # fmt: skip
    transformer = Transformer(str(base), max_seq_length=64)
    library.SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "encoder"))
    manifest = run_pipeline(
        config(planted[0], tmp_path / "out", embeddings=None, encoder=str(tmp_path / "encoder"), remove=0.1)
    )
    assert manifest["steps"]["semantic_dedup"]["dropped"]["alike"] == 165
    vectors = np.load(Run.load(tmp_path / "out").files("embed", kind="vectors")[0]["path"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
