import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.fertility import digit_pieces, has_one_token_per_digit
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.training import TokenizerSettings
from megatron_ru.tokenizer.training_hugging_face import train_hugging_face

SIZES = {"bpe": 420, "unigram": 400}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("folders") / request.param
    wanted = TokenizerSettings(
        model_type=request.param, vocab_size=SIZES[request.param], special_tokens=("<|user|>", "<|end|>")
    )
    assert train_hugging_face(["", *texts, ""], path, wanted) == len(texts)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_control_pieces_come_first(tokenizer):
    assert tokenizer.vocab_size in SIZES.values()
    assert tokenizer.pieces()[:6] == ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|end|>"]
    assert tokenizer.control_pieces() == tokenizer.pieces()[:6]
    assert (tokenizer.eod, tokenizer.pad) == (2, 3)


def test_every_digit_is_one_token(tokenizer):
    assert digit_pieces(tokenizer) == list("0123456789")
    assert has_one_token_per_digit(tokenizer)


def test_frequent_words_become_tokens(tokenizer):
    assert len(tokenizer.encode(" кошка")) < len("кошка") - 1


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40))
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["</s>", "<s>", "<|user|>", "<pad>", "<unk>", " ", "кошка", "<", "\n"]), max_size=12))
def test_control_tokens_in_text_stay_text(tokenizer, parts):
    ids = tokenizer.encode("".join(parts))
    assert not set(range(6)) & set(ids)
    assert tokenizer.decode(ids) == "".join(parts)


def test_transformers_and_megatron_load_the_folder(folder, tokenizer, texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert theirs(texts[0], add_special_tokens=False)["input_ids"] == tokenizer.encode(texts[0])
    assert (theirs.unk_token, theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<unk>", "<s>", "</s>", "<pad>")
    assert theirs.decode(tokenizer.encode(texts[0])) == texts[0]
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    assert HuggingFaceTokenizer(str(folder)).text_to_ids(texts[0]) == tokenizer.encode(texts[0])


def test_bpe_is_the_same_file_for_the_same_text(tmp_path, texts):
    for name in ("a", "b"):
        train_hugging_face(iter(texts), tmp_path / name, TokenizerSettings(vocab_size=400))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "</s>"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_normalisation_unifies_both_forms_of_a_letter(tmp_path, texts, model_type):
    forms = {}
    for name in ("identity", "nfc", "nfkc"):
        wanted = TokenizerSettings(model_type=model_type, vocab_size=380, normalization=name)
        train_hugging_face(texts, tmp_path / name, wanted)
        tokenizer = load_tokenizer(tmp_path / name)
        forms[name] = tokenizer.decode(tokenizer.encode("\u0438\u0306 ﬁ"))
    assert forms == {"identity": "\u0438\u0306 ﬁ", "nfc": "й ﬁ", "nfkc": "й fi"}


def test_a_vocabulary_too_large_for_the_text_names_one_that_is_not(tmp_path):
    texts = ["раз два три четыре пять"] * 20
    with pytest.raises(UserError, match=r"vocabulary of 5000 is too large .* 20 documents are enough for (\d+) bpe"):
        train_hugging_face(texts, tmp_path / "a", TokenizerSettings(vocab_size=5000))
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no text to learn a tokenizer from"):
        train_hugging_face(["", ""], tmp_path / "a", TokenizerSettings(vocab_size=300))
    with pytest.raises(UserError, match="tokenizers has no nmt_nfkc: choose nfkc"):
        train_hugging_face(["раз"], tmp_path / "a", TokenizerSettings(normalization="nmt_nfkc"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write \S*file/a"):
        train_hugging_face(["раз два"] * 5, tmp_path / "file" / "a", TokenizerSettings(vocab_size=263))
