import json

import pytest

from megatron_ru.tokenizer.cutting import CutRule, cut_rule, cut_text
from megatron_ru.tokenizer.fast_form import fast_form
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.patterns import GPT_2, GPT_4, GPT_4O, QWEN_2
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
KEEP, SPACES, DROP = (
    CutRule(blanks=" \n", dropped=False), CutRule(blanks=" ", dropped=False), CutRule(blanks=" ", dropped=True),
)  # fmt: skip


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def test_pieces_are_cut_behind_letters_and_lose_nothing():
    text = "раз два 3 четыре\nпять"
    assert list(cut_text(text, KEEP, 5)) == ["раз два", " 3 четыре", "\nпять"]
    assert list(cut_text(text, SPACES, 1)) == ["раз", " два", " 3 четыре\nпять"]
    assert list(cut_text(text, DROP, 1)) == ["раз", "два", "3 четыре\nпять"]


def test_no_place_no_cut():
    assert list(cut_text("1 2 3 4 5", KEEP, 1)) == ["1 2 3 4 5"]
    assert list(cut_text("", KEEP, 1)) == [""]
    # Not behind a mark, not at the very end: with the blank dropped nothing would be left.
    assert list(cut_text("и\u0306 а ", DROP, 1)) == ["и\u0306 а "]


@pytest.mark.parametrize(
    ("pre_tokenizer", "rule"),
    [
        ({**BYTES, "use_regex": True}, KEEP),
        (sequence({"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}), KEEP),
        *((sequence(split(pattern), BYTES), KEEP) for pattern in (GPT_2, GPT_4, GPT_4O, QWEN_2)),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, SPACES),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}, None),
        (sequence(split(r"\w+ \w+|."), BYTES), None),
        ({**BYTES, "use_regex": True, "add_prefix_space": True}, None),
        (BYTES, None),
        (None, None),
    ],
)
def test_rules_by_the_pre_tokenizer(hugging_face_file, pre_tokenizer, rule):
    def change(description):
        description["pre_tokenizer"] = pre_tokenizer

    assert cut_rule(load_tokenizer(hugging_face_file(change))) == rule


@pytest.mark.parametrize(
    ("normalizer", "rule"),
    [
        ({"type": "NFC"}, SPACES),
        ({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}, SPACES),
        ({"type": "Strip", "strip_left": True, "strip_right": True}, None),
        ({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, None),
    ],
)
def test_rules_by_the_normaliser(hugging_face_file, normalizer, rule):
    def change(description):
        description["normalizer"] = normalizer

    assert cut_rule(load_tokenizer(hugging_face_file(change))) == rule


@pytest.mark.parametrize(("field", "value"), [("rstrip", True), ("single_word", True), ("content", "a b")])
def test_added_tokens_that_reach_over_a_cut_forbid_it(hugging_face_file, field, value):
    def change(description):
        token = {
            "id": 400, "content": "added", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": False,
        }  # fmt: skip
        description["added_tokens"].append({**token, field: value})

    assert cut_rule(load_tokenizer(hugging_face_file(change))) is None


def test_sentencepiece_bpe_is_cut_and_unigram_only_where_it_is_very_long(sentencepiece_model):
    found = cut_rule(load_tokenizer(sentencepiece_model))
    assert found == CutRule(blanks=" ", dropped=True, above=0 if sentencepiece_model.stem == "bpe" else 1 << 22)


def test_a_model_that_normalises_is_not_cut(tmp_path, texts):
    train_tokenizer(texts, tmp_path / "a.model", TokenizerSettings(vocab_size=370, normalization="nmt_nfkc"))
    assert cut_rule(load_tokenizer(tmp_path / "a.model")) is None


def test_fast_forms_split_as_the_originals(hugging_face_file, texts):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer

    from megatron_ru.tokenizer.difficult_texts import difficult_texts

    digits = {"type": "Digits", "individual_digits": True}
    for original in (
        sequence(digits, {**BYTES, "use_regex": True}),
        sequence(sequence(digits), {**BYTES, "use_regex": True}),
        sequence(split(GPT_2), BYTES),
        sequence({**BYTES, "use_regex": True}),
    ):
        description = json.loads(hugging_face_file().read_text())
        found = []
        for form in (original, fast_form(original)):
            tokenizer = Tokenizer.from_str(json.dumps({**description, "pre_tokenizer": form}))
            found.append([tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in [*texts[:50], *difficult_texts()]])
        assert fast_form(original) != original
        assert found[0] == found[1]
    for same in (sequence(split(QWEN_2), BYTES), {**BYTES, "use_regex": True}, None):
        assert fast_form(same) == same
