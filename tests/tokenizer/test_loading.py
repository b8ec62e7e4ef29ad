import json

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.loading import load_tokenizer


def test_control_tokens_in_text_stay_text_in_sentencepiece(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    text = "a </s> b <s><unk><pad> <0x0A>"
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 3} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, tokenizer.eod]) == text


def test_control_tokens_in_text_stay_text_in_hugging_face(hugging_face_file):
    tokenizer = load_tokenizer(hugging_face_file())
    assert tokenizer.eod == 0
    text = "a <|endoftext|> b <pad>"
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids)
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


def test_an_end_token_that_is_not_marked_special_stays_text_too(hugging_face_file):
    def unmark(description):
        for token in description["added_tokens"]:
            token["special"] = False

    tokenizer = load_tokenizer(hugging_face_file(unmark))
    assert tokenizer.eod == 0
    assert 0 not in tokenizer.encode("a <|endoftext|>")
    # One that nobody calls a control token is vocabulary, and is found.
    assert 1 in tokenizer.encode("a <pad>")


@pytest.mark.parametrize("form", ["</end>", {"content": "</end>", "lstrip": False}])
def test_the_configuration_beside_it_names_the_end_token(hugging_face_file, form):
    path = hugging_face_file(special=("<|endoftext|>", "</end>"))
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": form}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod == 1
    assert 1 not in tokenizer.encode("</end>")


def test_without_an_end_token_there_is_none(hugging_face_file):
    assert load_tokenizer(hugging_face_file(special=("[X]",))).eod is None


def test_nothing_is_added_around_the_text(hugging_face_file):
    def add_end(description):
        special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        description["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": special},
        }
        description["truncation"] = {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip

    plain = load_tokenizer(hugging_face_file()).encode("кошка и медведь, собака и дерево")
    assert len(plain) > 3
    assert load_tokenizer(hugging_face_file(add_end)).encode("кошка и медведь, собака и дерево") == plain


def test_the_vocabulary_size_covers_the_highest_id(hugging_face_file):
    def add_far(description):
        description["added_tokens"].append(
            {"id": 999, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        )  # fmt: skip

    size = load_tokenizer(hugging_face_file()).vocab_size
    # tokenizers numbers added tokens itself, from the end of the vocabulary.
    tokenizer = load_tokenizer(hugging_face_file(add_far))
    assert tokenizer.vocab_size == len(tokenizer.pieces()) >= size + 1
    assert tokenizer.pieces()[-1] == "<far>"


def test_batches_are_encoded_as_single_texts_are(sentencepiece_model, hugging_face_file, texts):
    for path in (sentencepiece_model, hugging_face_file()):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode_batch([*texts[:20], ""]) == [tokenizer.encode(text) for text in texts[:20]] + [[]]


def test_a_folder_stands_for_the_tokenizer_in_it(hugging_face_file, tmp_path, sentencepiece_model):
    path = hugging_face_file()
    assert load_tokenizer(path.parent).path == str(path)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match=r"other holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(other)
    (other / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(other).vocab_size == 370


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", None, r"no tokenizer at .*a\.model; train one with `megatron-ru tokenizer train"),
        ("a.model", b"", r"a\.model is not a sentencepiece model"),
        ("a.model", b"noise" * 100, r"a\.model is not a sentencepiece model"),
        ("a.json", b"{", r"a\.json is not a Hugging Face tokenizer\.json"),
        ("a.json", b"[]", r"a\.json is not a Hugging Face tokenizer\.json"),
        ("a.json", b'{"version": "1.0"}', r"a\.json is not a Hugging Face tokenizer\.json"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)


def test_a_text_that_the_library_refuses_is_a_mistake_of_the_tokenizer(hugging_face_file):
    def without_unknown(description):
        description["model"] = {"type": "WordLevel", "vocab": {"a": 2}, "unk_token": "[UNK]"}

    tokenizer = load_tokenizer(hugging_face_file(without_unknown))
    with pytest.raises(UserError, match=r"tokenizer.json cannot encode every text: .*UNK.*; take a tokenizer that can"):
        tokenizer.encode("б")
