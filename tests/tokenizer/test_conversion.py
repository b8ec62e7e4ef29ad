import json

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.conversion import hugging_face_description, sentencepiece_bytes
from megatron_ru.tokenizer.converting import convert
from megatron_ru.tokenizer.equality import compare, texts_to_compare
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.sentencepiece_model import read_model
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("models") / "bpe.model"
    train_tokenizer(texts, path, TokenizerSettings(vocab_size=370, special_tokens=("<|user|>",)))
    return path


def test_a_bpe_model_and_its_tokenizer_json_give_the_same_ids_there_and_back(tmp_path, bpe, texts):
    there = convert(bpe, tmp_path / "folder", texts)
    assert there.differing == 0
    # The texts, their damaged copies, the vocabulary and more than 200 difficult texts.
    assert there.texts > 2 * len(texts) + 200
    folder, model = load_tokenizer(tmp_path / "folder"), load_tokenizer(bpe)
    assert (folder.vocab_size, folder.eod, folder.pad) == (model.vocab_size, model.eod, model.pad) == (370, 2, 3)
    assert folder.pieces() == model.pieces()
    assert folder.control_pieces() == ["<unk>", "<s>", "</s>", "<pad>", "<|user|>"]
    for text in ("</s> кошка <|user|>", "  два  \n", "日本 👩\u200d👧 й и\u0306"):
        assert folder.encode(text) == model.encode(text)
        assert folder.decode(folder.encode(text)) == text
    assert convert(tmp_path / "folder", tmp_path / "back.model", texts).differing == 0
    back = load_tokenizer(tmp_path / "back.model")
    assert (back.eod, back.pad, back.control_pieces()) == (2, 3, model.control_pieces())


def test_transformers_and_megatron_load_the_folder(tmp_path, bpe, texts):
    transformers = pytest.importorskip("transformers")
    convert(bpe, tmp_path / "folder", texts[:5])
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "folder"))
    ours = load_tokenizer(bpe)
    assert theirs(texts[0], add_special_tokens=False)["input_ids"] == ours.encode(texts[0])
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 3, 370)
    assert theirs.decode(ours.encode(texts[1])) == texts[1]
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    megatron = HuggingFaceTokenizer(str(tmp_path / "folder"))
    assert megatron.text_to_ids(texts[0]) == ours.encode(texts[0])
    assert (megatron.eos_id, megatron.vocab_size) == (2, 370)


def test_a_difference_is_refused_with_the_text_and_can_be_accepted(tmp_path, texts):
    """Ties: unigram pieces of one character alone cost the same in any order, and each library has its own."""
    letters = "".join(map(chr, range(32, 127)))
    train_tokenizer(
        [*texts, *[letters] * 60, *["=" * 40] * 30],
        tmp_path / "a.model",
        TokenizerSettings(model_type="unigram", vocab_size=420),
    )
    with pytest.raises(UserError, match=r"gives other ids on \d+ of \d+ texts; the first: .* is '.*' and '.*nothing"):
        convert(tmp_path / "a.model", tmp_path / "folder", texts)
    assert not (tmp_path / "folder").exists()
    found = convert(tmp_path / "a.model", tmp_path / "folder", texts, accept_differences=True)
    assert 0 < found.differing < 0.2 * found.texts
    converted = load_tokenizer(tmp_path / "folder")
    assert converted.encode("кошка") == load_tokenizer(tmp_path / "a.model").encode("кошка")
    # Scores keep the literals of control tokens out of reach.
    assert not {0, 1, 2, 3} & set(converted.encode("кошка </s><s> <pad> <unk>"))


def test_comparing_finds_one_text_among_many(bpe, tmp_path, texts):
    description = hugging_face_description(bpe)
    # Only the order of the merges is another.
    description["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    found = compare(load_tokenizer(bpe), load_tokenizer(tmp_path / "tokenizer.json"), texts_to_compare(
        load_tokenizer(bpe), texts
    ))  # fmt: skip
    assert found.differing > 0
    assert " is '" in found.example


def test_damaged_copies_are_always_the_same(bpe):
    tokenizer = load_tokenizer(bpe)
    first, second = (list(texts_to_compare(tokenizer, ["кошка и собака " * 10])) for _ in range(2))
    assert first == second
    assert first[-1] != first[-2] == "кошка и собака " * 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"normalization": "nmt_nfkc"}, r"it normalises text \(nmt_nfkc\)")],
)
def test_models_that_hugging_face_cannot_express_are_refused(tmp_path, texts, settings, message):
    train_tokenizer(texts, tmp_path / "a.model", TokenizerSettings(vocab_size=370, **settings))
    with pytest.raises(UserError, match=rf"cannot convert \S*a\.model to tokenizer\.json: {message}"):
        convert(tmp_path / "a.model", tmp_path / "folder", texts)


def test_a_byte_level_tokenizer_cannot_become_a_model(hugging_face_file, tmp_path, texts):
    with pytest.raises(UserError, match=r"cannot convert this tokenizer\.json .*: sentencepiece has no pre-tokenizer"):
        convert(hugging_face_file(), tmp_path / "a.model", texts)


def test_the_same_format_twice_is_a_mistake(bpe, tmp_path, texts):
    with pytest.raises(UserError, match=r"bpe\.model is a \.model, and so would be \S*b\.model; convert to"):
        convert(bpe, tmp_path / "b.model", texts)


def test_ids_with_gaps_have_no_model(bpe):
    description = hugging_face_description(bpe)
    description["model"]["vocab"] = {piece: 2 * number for piece, number in description["model"]["vocab"].items()}
    with pytest.raises(UserError, match=r"the ids of this tokenizer\.json have gaps"):
        sentencepiece_bytes(description, {})


def test_a_model_tells_what_it_is(bpe):
    model = read_model(bpe)
    assert (model.type_name, model.is_bpe, model.normalization, model.has_rules) == ("bpe", True, "identity", False)
    assert model.keeps_every_character
    assert model.adds_prefix
    assert model.byte_fallback
    assert not model.has_user_pieces
    assert model.ids == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    assert [piece.text for piece in model.pieces[:6]] == ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<0x00>"]


@pytest.mark.parametrize("content", [b"", b"noise" * 100])
def test_what_is_no_model_is_named(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.model is not a sentencepiece model"):
        read_model(tmp_path / "a.model")
