"""A small corpus of two domains with everything that a pipeline drops, a tokenizer for it, and a config."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
import yaml

from megatron_ru.data.config_file import load_config
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer

WORDS = {
    "ru": [
        "мама",
        "мыла",
        "раму",
        "вечером",
        "дом",
        "стоял",
        "у",
        "реки",
        "старый",
        "мельник",
        "знал",
        "дорогу",
        "через",
        "тёмный",
        "лес",
        "и",
        "поле",
        "ёлка",
        "снег",
    ],
    "en": [
        "the",
        "old",
        "miller",
        "knew",
        "the",
        "way",
        "through",
        "dark",
        "woods",
        "and",
        "fields",
        "where",
        "a",
        "house",
        "stood",
        "near",
        "the",
        "quiet",
        "river",
    ],
}


def text_of(generator: random.Random, language: str, words: int) -> str:
    """Sentences in paragraphs."""
    parts = []
    for number in range(words):
        parts.append(generator.choice(WORDS[language]))
        if number % 17 == 16:
            parts[-1] += ".\n"
    return " ".join(parts).replace("\n ", "\n")


def write_corpus(folder: Path, documents: int = 300) -> list[str]:
    """Two Russian files, one compressed, and an English one; returns the texts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(7)
    texts = []
    for name, language in (("ru_1.jsonl", "ru"), ("ru_2.jsonl.gz", "ru"), ("en.jsonl", "en")):
        lines = []
        for number in range(documents):
            draw = generator.random()
            if lines and draw < 0.26:
                text = generator.choice(texts)
            else:
                text = text_of(generator, language, generator.randrange(5, 160))
            texts.append(text)
            lines.append(json.dumps({"id": number, "text": text, "domain": language}, ensure_ascii=number % 2 == 0))
        content = ("\n".join(lines) + "\n").encode()
        if name.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        (folder / name).write_bytes(content)
    return texts


@pytest.fixture(autouse=True)
def disk_in_memory(monkeypatch):
    """No test cuts the power, and hundreds of small files take their time to reach a disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    generator = random.Random(3)
    texts = [text_of(generator, language, 100) for language in WORDS for _ in range(50)]
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(texts, path, TokenizerSettings(vocab_size=400))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """(folder, texts in order)."""
    return tmp_path / "corpus", write_corpus(tmp_path / "corpus")


@pytest.fixture
def config_of(corpus, tmp_path, tokenizer_file):
    """config_of(name, **changes): the pipeline that writes into the folder of that name."""

    def make(name="out", **changes):
        value = {
            "output": name,
            "inputs": [
                {"domain": "ru", "files": ["corpus/ru_*"], "weight": 0.7},
                {"domain": "en", "files": ["corpus/en.jsonl"], "weight": 0.3},
            ],
            "shard_megabytes": 0.03,
            "tokens": {"tokenizer": tokenizer_file, "held_out": 0.05},
            "packing": {"block": 64, "group_tokens": 5000},
            "mixture": {"samples": 700, "samples_per_part": 100},
        } | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: item for key, item in value.items() if item is not None}))
        return load_config(path)

    return make


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file that a pipeline left, but for times, by its path."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock" and path.parent.name != "tasks":
            kept[str(path.relative_to(folder))] = path.read_bytes().replace(str(folder).encode(), b"OUT")
    return kept
