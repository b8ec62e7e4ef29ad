import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer import training
from megatron_ru.tokenizer.fertility import digit_pieces, has_one_token_per_digit
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.training import SPECIAL_PIECES, TokenizerSettings, train_tokenizer


def test_ids_of_control_pieces_and_size(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.vocab_size == 370
    assert tokenizer.pieces()[:4] == list(SPECIAL_PIECES) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.eod == 2


def test_every_digit_is_one_token(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert digit_pieces(tokenizer) == list("0123456789")
    assert has_one_token_per_digit(tokenizer)
    pieces = tokenizer.pieces()
    assert [pieces[token] for token in tokenizer.encode("1234")] == ["▁", "1", "2", "3", "4"]


def test_all_ten_digits_are_there_when_the_text_has_none(tmp_path):
    train_tokenizer(["слово за словом"] * 10, tmp_path / "a.model", TokenizerSettings(vocab_size=290))
    assert digit_pieces(load_tokenizer(tmp_path / "a.model")) == list("0123456789")


def test_frequent_words_become_tokens(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert "▁кошка" in tokenizer.text_pieces()
    assert len(tokenizer.encode("кошка")) == 1


# The sign that sentencepiece writes for a space is the one text that does not come back.
@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40))
def test_decoding_gives_back_any_text(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("roundtrip") / "a.model"
    train_tokenizer(texts, path, TokenizerSettings(vocab_size=370))
    return load_tokenizer(path)


def test_nmt_nfkc_unifies_and_identity_keeps(tmp_path, texts):
    forms = {}
    for normalization in ("identity", "nmt_nfkc"):
        path = tmp_path / f"{normalization}.model"
        train_tokenizer(texts, path, TokenizerSettings(vocab_size=370, normalization=normalization))
        tokenizer = load_tokenizer(path)
        forms[normalization] = tokenizer.decode(tokenizer.encode("ﬁ  №"))
    assert forms == {"identity": "ﬁ  №", "nmt_nfkc": "fi  No"}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_bytes(tmp_path, texts, model_type):
    for name in ("a.model", "b.model"):
        chosen = TokenizerSettings(model_type=model_type, vocab_size=370, max_sentences=200)
        assert train_tokenizer(iter(texts), tmp_path / name, chosen) == 200
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_a_line_too_long_for_sentencepiece_is_learned_in_pieces(tmp_path):
    # 40 kB on one line, which sentencepiece alone would drop (its limit is 4192 bytes).
    lines = train_tokenizer(["слово " * 4000], tmp_path / "a.model", TokenizerSettings(vocab_size=285))
    assert lines == 23
    assert "▁слово" in load_tokenizer(tmp_path / "a.model").pieces()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_vocabulary_too_large_for_the_text_names_one_that_is_not(tmp_path, model_type):
    texts = ["раз два три четыре пять"] * 20
    with pytest.raises(UserError, match=r"vocabulary of 5000 is too large .* its 20 lines .*--vocab-size") as raised:
        train_tokenizer(texts, tmp_path / "a.model", TokenizerSettings(model_type=model_type, vocab_size=5000))
    assert list(tmp_path.iterdir()) == []
    possible = int(str(raised.value).split("--vocab-size ")[1].split()[0])
    train_tokenizer(texts, tmp_path / "a.model", TokenizerSettings(model_type=model_type, vocab_size=possible))
    assert load_tokenizer(tmp_path / "a.model").vocab_size == possible


def test_a_vocabulary_too_small_for_the_characters_says_what_they_need(tmp_path):
    with pytest.raises(UserError, match=r"vocabulary of 100 is too small: .* need 2\d\d; pass that --vocab-size"):
        train_tokenizer(["раз два"], tmp_path / "a.model", TokenizerSettings(vocab_size=100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", " \n\t\n"]])
def test_without_text_there_is_no_tokenizer(tmp_path, texts):
    with pytest.raises(UserError, match="no text to learn a tokenizer from"):
        train_tokenizer(texts, tmp_path / "a.model", TokenizerSettings(vocab_size=300))
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/a\.model"):
        train_tokenizer(["раз"], tmp_path / "file" / "a.model", TokenizerSettings(vocab_size=300))
    with pytest.raises(UserError, match=r"a\.json would be taken for a Hugging Face tokenizer"):
        train_tokenizer(["раз"], tmp_path / "a.json", TokenizerSettings(vocab_size=300))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_type": "word"}, "unknown model type 'word': choose one of bpe, unigram"),
        ({"normalization": "nfd"}, "unknown normalization 'nfd': choose one of identity, nfc, nfkc, nmt_nfkc"),
        ({"special_tokens": ("<a>", "<a>")}, r"the special tokens \['<a>', '<a>'\] must differ"),
        ({"special_tokens": ("<s>",)}, r"the special tokens \['<s>'\] must differ"),
        ({"longest_piece": 0}, "the longest piece has 0 characters"),
        ({"vocab_size": 0}, "the vocabulary size is 0; it must be positive"),
        ({"character_coverage": 1.5}, "the character coverage is 1.5"),
        ({"max_sentences": 0}, "the number of sentences to learn from is 0"),
    ],
)
def test_settings_check_themselves(wrong, message):
    with pytest.raises(UserError, match=message):
        TokenizerSettings(**wrong)


def test_the_sample_is_even_and_repeatable():
    def draw(seed: int) -> list[str]:
        return training._reservoir(map(str, range(20)), 5, random.Random(seed))

    assert draw(1) == draw(1)
    assert training._reservoir(["a", "b"], 5, random.Random(1)) == ["a", "b"]
    counts = Counter(item for seed in range(4000) for item in draw(seed))
    # Each is expected 1000 times with a standard deviation of 27; 5 of them are allowed.
    assert set(counts) == set(map(str, range(20)))
    assert all(abs(count - 1000) < 137 for count in counts.values())
