"""A tokenizer and a text small enough to be made for a test."""

import json
import random

import pytest

from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 texts; some are empty, some hold what is easily got wrong."""
    generator = random.Random(0)
    words = ["кошка", "собака", "медведь", "дерево", "река", "город", "tokens", "data", "2024", "15"]
    texts = [" ".join(generator.choices(words, k=generator.randrange(1, 60))) for _ in range(290)]
    return [*texts, "", " ", "\n\n", "</s><unk>", "a\0b", "😀\t1234567890", "  два  ", "\r\n", "й", "Ω" * 500]


@pytest.fixture(scope="session")
def model(tmp_path_factory, texts) -> str:
    """The path of a sentencepiece model of 320 ids."""
    path = tmp_path_factory.mktemp("model") / "a.model"
    train_tokenizer(texts, path, TokenizerSettings(vocab_size=320))
    return str(path)


@pytest.fixture
def jsonl_files(tmp_path, texts) -> list[str]:
    """The texts in two files of a folder of their own."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, part in (("a.jsonl", texts[:100]), ("b.jsonl", texts[100:])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
