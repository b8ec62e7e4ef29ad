import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.patterns import GPT_2, QWEN_2
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer
from megatron_ru.tokens import encoding as module
from megatron_ru.tokens.encoding import Encoder, EncoderCounts, load_encoder

pytest.importorskip("fastokens")

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS = {
    "gpt2": {**BYTES, "use_regex": True},
    "gpt2 spelled out": [{**SPLIT, "pattern": {"Regex": GPT_2}}, BYTES],
    "digits": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}],
    "qwen2": [{**SPLIT, "pattern": {"Regex": QWEN_2}}, BYTES],
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz <>/|_"

# What goes wrong at the edges of Unicode: both forms of й and ё, marks, emoji of several parts, right to left, blanks.
PARTS = [
    "кошка", "собака", "Ёлка", "ё", "е\u0308", "й", "и\u0306", "e\u0301\u0323", "\u0301", "👩\u200d👩\u200d👧", "🇷🇺",
    "🏳\ufe0f\u200d🌈", "שָׁלוֹם", "مرحبا", "\u202eабв\u202c", "日本", "123", "٣", "½", " ", "  ", "\n", "\n\n", "\t",
    "\r\n", "\0", "\u00a0", "\u2028", "'s", "'S", "</s>", "<s>", "<|endoftext|>", "▁", "Ġ", "<0x0A>", "—", "...", "x",
    "data",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join), st.text(st.characters(codec="utf-8"), max_size=60)
)


@pytest.fixture(scope="module")
def texts_of_words(texts):
    return [*[LETTERS] * 40, *texts, *(" ".join(PARTS[: 1 + number % len(PARTS)]) for number in range(60))]


@pytest.fixture(scope="module", params=[*PRE_TOKENIZERS, "bpe.model", "unigram.model"])
def path(request, tmp_path_factory, texts_of_words):
    """A small tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param.endswith(".model"):
        kind = request.param.removesuffix(".model")
        train_tokenizer(texts_of_words, folder / "a.model", TokenizerSettings(model_type=kind, vocab_size=400))
        return str(folder / "a.model")
    import tokenizers

    pre = PRE_TOKENIZERS[request.param]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre} if isinstance(pre, list) else pre
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts_of_words, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def encoder(path):
    return load_encoder(path)


def is_unigram(encoder):
    return "sentencepiece model is none" in encoder.slow_reason


def test_bpe_is_fast_and_unigram_is_not(encoder):
    assert encoder.slow_reason == "" or is_unigram(encoder)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_every_text_has_the_ids_of_the_tokenizer_itself(encoder, text):
    ids = encoder.encode(text)
    assert ids.tolist() == encoder.tokenizer.encode(text)
    assert ids.dtype == np.uint16
    control = {encoder.tokenizer.pieces().index(piece) for piece in encoder.tokenizer.control_pieces()}
    assert not control & set(ids.tolist())


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, size=st.integers(1, 30))
def test_pieces_together_have_the_ids_of_the_whole(encoder, text, size):
    whole = encoder.tokenizer.encode(text)
    encoder_of_pieces = Encoder(encoder.tokenizer, fast=False)
    encoder_of_pieces._fast = encoder._fast
    module_size, module._PIECE_CHARACTERS = module._PIECE_CHARACTERS, size
    group_size, module._GROUP_CHARACTERS = module._GROUP_CHARACTERS, 40
    try:
        ids, lengths = encoder_of_pieces.encode_flat(["кошка", text, "", text])
    finally:
        module._PIECE_CHARACTERS, module._GROUP_CHARACTERS = module_size, group_size
    first = encoder.tokenizer.encode("кошка")
    assert ids.tolist() == [*first, *whole, *whole]
    assert lengths.tolist() == [len(first), len(whole), 0, len(whole)]


def test_long_texts_are_cut_where_that_is_proved(encoder):
    # 60 pieces of 65536 characters, so that the counts tell whether it was cut.
    text = "собака и кошка " * 262_144
    encoder.counts = EncoderCounts()
    ids = encoder.encode(text)
    if is_unigram(encoder):
        assert encoder.counts.pieces == 1
        assert ids.tolist() == encoder.tokenizer.encode(text)
    else:
        assert encoder.counts.pieces == 60
        # The first and the last repetition may differ from the others by the blank at the ends.
        body = encoder.tokenizer.encode("собака и кошка " * 1000)
        assert ids[: len(body) - 20].tolist() == body[:-20]
        assert len(ids) == len(body) + (262_144 - 1000) * (
            len(encoder.tokenizer.encode("собака и кошка " * 1001)) - len(body)
        )


def test_batches_are_views_in_order(encoder, texts):
    found = encoder.encode_batch(texts)
    assert [ids.tolist() for ids in found] == encoder.tokenizer.encode_batch(texts)
    assert encoder.encode_batch([]) == []
    assert encoder.encode_batch([""])[0].tolist() == []


def test_an_encoder_is_pickled_as_its_path(encoder, texts):
    copy = pickle.loads(pickle.dumps(encoder))
    assert (copy.path, copy.vocabulary_size, copy.eos, copy.pad) == (
        encoder.path, encoder.vocabulary_size, encoder.eos, encoder.pad,
    )  # fmt: skip
    assert copy.encode(texts[3]).tolist() == encoder.encode(texts[3]).tolist()


class Wrong:
    """A fast engine that gives one id too many for every text with a 7."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode_flat(self, texts):
        found = [[*self.tokenizer.encode(text), *([5] if "7" in text else [])] for text in texts]
        ids = np.array([token for ids in found for token in ids], np.uint32)
        return ids, np.array(list(map(len, found)), np.int32)


class Raising(Wrong):
    def encode_flat(self, texts):
        if any("7" in text for text in texts):
            raise BaseException("panicked")
        return super().encode_flat(texts)


def with_engine(model, engine):
    notes = []
    encoder = load_encoder(model, report=notes.append)
    encoder._fast = engine(load_tokenizer(model))
    return encoder, notes


def test_a_difference_is_caught_told_once_and_ends_fast_encoding(model):
    encoder, notes = with_engine(model, Wrong)
    reference = load_tokenizer(model)
    # With 7 and long enough a list that one in 256 is among them.
    texts = [f"кошка 7 {number}" for number in range(2000)]
    found = [ids.tolist() for ids in encoder.encode_batch(texts)]
    assert found == reference.encode_batch(texts)
    assert (encoder.counts.differed, len(notes)) == (1, 1)
    assert "fastokens gives other ids" in notes[0]
    assert "'кошка 7 " in notes[0]
    assert "other ids" in encoder.slow_reason
    assert encoder.encode("7").tolist() == reference.encode("7")
    assert encoder.counts.checked < 30


def test_what_is_checked_depends_on_the_text_alone():
    chosen = [number for number in range(10_000) if module._is_checked(f"кошка {number}")]
    assert 10 < len(chosen) < 80
    assert chosen[:3] == [number for number in range(chosen[2] + 1) if module._is_checked(f"кошка {number}")]


def test_where_the_engine_raises_the_reference_encodes(model):
    encoder, notes = with_engine(model, Raising)
    texts = ["кошка", "7 собак", "дерево", "77", ""]
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == load_tokenizer(model).encode_batch(texts)
    assert (encoder.counts.pieces, encoder.counts.raised, len(notes)) == (5, 2, 1)
    assert "gives up on a text of 7 characters that begins '7 собак' (panicked)" in notes[0]
    # It is not given up for that.
    assert encoder._fast is not None


def test_a_million_blanks_are_encoded(path):
    """fastokens 0.3.5 raises on them with a pattern that looks ahead."""
    encoder = load_encoder(path, report=lambda note: None)
    text = "кошка" + " " * 1_100_000 + "собака"
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


def test_an_engine_that_is_known_to_differ_is_not_used(model):
    """fastokens 0.3.5 takes a literal <0x0A> for the byte where A has no piece of its own."""
    encoder = load_encoder(model)
    assert "A" not in encoder.tokenizer.pieces()
    assert "fastokens gives other ids for " in encoder.slow_reason
    text = "<0x0A> </s>"
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


def test_a_very_long_text_of_a_unigram_model_is_cut_and_that_is_told(tmp_path, texts):
    train_tokenizer(texts, tmp_path / "a.model", TokenizerSettings(model_type="unigram", vocab_size=300))
    notes = []
    encoder = load_encoder(tmp_path / "a.model", report=notes.append)
    long = "собака и кошка " * 300_000
    ids, lengths = encoder.encode_flat([long, "кошка", long])
    assert (encoder.counts.pieces, encoder.counts.inexact, len(notes)) == (5, 2, 1)
    assert "a text of 4500000 characters is encoded in pieces" in notes[0]
    assert encoder.tokenizer.decode(ids[: lengths[0]].tolist()) == long
    assert lengths[0] == lengths[2]


def test_counts_add_up():
    assert EncoderCounts(pieces=1, checked=2, raised=3, differed=4) + EncoderCounts(pieces=10) == EncoderCounts(
        pieces=11, checked=2, raised=3, differed=4
    )


def test_without_fastokens_or_by_wish_the_reference_encodes(path, monkeypatch):
    assert load_encoder(path, fast=False).slow_reason == "fast encoding is switched off"
    monkeypatch.setattr("megatron_ru.tokenizer.fast.importlib.util.find_spec", lambda name: None)
    encoder = load_encoder(path)
    assert "fastokens is not installed: pip install 'megatron-ru[data]'" in encoder.slow_reason
    assert encoder.encode("кошка").tolist() == encoder.tokenizer.encode("кошка")
