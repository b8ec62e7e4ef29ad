"""Tokenizers small enough to be trained for a test."""

import json
import random

import pytest

from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer

# Of syllables, so that there is something to learn for several hundred pieces.
SYLLABLES = ("ко", "шка", "со", "ба", "мед", "ве", "де", "ре", "го", "род", "чис", "ло", "мо", "дель")
WORDS = [
    "кошка",
    "интеллект",
    *(a + b + c for a in SYLLABLES for b in SYLLABLES[::3] for c in ("", "ми", "to")),
]


def sample_texts(count: int) -> list[str]:
    """`count` texts of two lines each, with digits and runs of spaces, always the same."""
    generator = random.Random(0)
    return [
        " ".join(generator.choices(WORDS, k=8)) + f" кошка\n    глава {generator.randrange(10_000)}: "
        + " ".join(generator.choices(WORDS, k=8))
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sample_texts(300)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def sentencepiece_model(request, tmp_path_factory, texts):
    """The path of a trained model, for each type."""
    path = tmp_path_factory.mktemp("models") / f"{request.param}.model"
    train_tokenizer(texts, path, TokenizerSettings(model_type=request.param, vocab_size=370))
    return path


@pytest.fixture
def hugging_face_file(tmp_path, texts):
    """A function that writes a byte-level BPE tokenizer.json, changed as asked, and returns its path."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def build(change=lambda description: None, digits=True, special=("<|endoftext|>", "<pad>")):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        description = json.loads(tokenizer.to_str())
        change(description)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(description), encoding="utf-8")
        return path

    return build
