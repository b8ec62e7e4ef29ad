import json

import pytest

from megatron_ru.text.document import Document
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.piece_text import piece_texts
from megatron_ru.tokenizer.training import TokenizerSettings
from megatron_ru.tokenizer.training_hugging_face import train_hugging_face
from megatron_ru.tokens.comparison import pieces_of, report_on
from megatron_ru.tokens.comparison_figures import bars_of, curves_of
from megatron_ru.tokens.comparison_report import as_json, markdown, tables
from megatron_ru.tokens.encoding import load_encoder

DOCUMENTS = [
    Document(text="кошка и собака", file="a/ru.jsonl.gz", fields={"domain": "pets"}),
    Document(text="cats and dogs, кот", file="a/en.jsonl", fields={"domain": "pets"}),
    Document(text="1234", file="a/en.jsonl", fields={}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("folder") / "bytes"
    train_hugging_face(texts, path, TokenizerSettings(vocab_size=318))
    return path


@pytest.fixture(scope="module")
def report(model, folder):
    encoders = {"sp_320": load_encoder(model), "hf_318": load_encoder(folder)}
    return report_on(encoders, iter(DOCUMENTS), ["domain", "file", "script"], ["кошка", "ёж"])


def test_documents_are_counted_in_their_groups(report, model):
    assert list(report.fertility) == [
        "all", "domain pets", "domain —", "file en", "file ru", "script Cyrillic", "script Latin", "script other",
    ]  # fmt: skip
    tokenizer = load_tokenizer(model)
    found = report.fertility["domain pets"]["sp_320"]
    tokens = sum(len(tokenizer.encode(document.text)) for document in DOCUMENTS[:2])
    assert (found.documents, found.characters, found.bytes, found.words, found.tokens) == (2, 32, 47, 7, tokens)
    assert report.fertility["script Latin"]["sp_320"].documents == 1
    assert report.fertility["all"]["hf_318"].documents == 3


def test_habits(report):
    sentencepiece, bytes_ = report.habits["sp_320"], report.habits["hf_318"]
    assert (sentencepiece.vocab_size, bytes_.vocab_size) == (320, 318)
    assert sentencepiece.one_token_per_digit
    assert bytes_.one_token_per_digit
    assert sentencepiece.keeps_text
    assert bytes_.keeps_text
    # A line feed is a byte for sentencepiece, and no two are one token.
    assert sentencepiece.blanks["2 line feeds"] == 2
    assert set(sentencepiece.blanks) == {"4 spaces", "16 spaces", "2 line feeds", "tab"}


def test_words_are_shown_as_text_in_every_format(report, folder):
    assert report.words["кошка"]["sp_320"] == ["▁кошка"]
    assert report.words["кошка"]["hf_318"] == [" кошка"]
    assert "".join(report.words["ёж"]["hf_318"]).startswith(" ")
    assert pieces_of(load_tokenizer(folder), "кошка") == [" кошка"]


def test_overlap_knows_the_same_piece_in_two_formats(report, model, folder):
    both = piece_texts(load_tokenizer(model)), piece_texts(load_tokenizer(folder))
    assert " кошка".encode() in both[0] & both[1]
    share = report.overlap["sp_320", "hf_318"]
    assert share == len(both[0] & both[1]) / min(map(len, both))
    assert 0 < share < 1


def test_the_same_numbers_in_every_form(report):
    found = report.fertility["all"]["sp_320"]
    header, rows = tables(report)["Text"]
    assert dict(zip(header, rows[0], strict=True)) == {
        "group": "all", "tokenizer": "sp_320", "documents": "3", "tokens": str(found.tokens),
        "characters per token": f"{found.characters_per_token:.3f}", "tokens per word": f"{found.tokens_per_word:.3f}",
        "bytes per token": f"{found.bytes_per_token:.3f}",
    }  # fmt: skip
    page = markdown(report)
    assert "## Digits and blanks" in page
    assert "| кошка | 1: ▁кошка | 1: ▁кошка |" in page
    data = json.loads(as_json(report))
    assert data["fertility"]["all"]["sp_320"]["tokens"] == found.tokens
    assert data["words"]["кошка"]["sp_320"] == ["▁кошка"]
    assert data["overlap"][0]["share"] == report.overlap["sp_320", "hf_318"]


def test_figures_show_both_measures(report):
    bars = bars_of(report)
    assert list(bars) == ["characters per token (rises)", "tokens per word (falls)"]
    assert bars["tokens per word (falls)"]["all · sp_320"] == report.fertility["all"]["sp_320"].tokens_per_word


def test_tokenizers_whose_names_differ_in_digits_are_one_curve(model, folder):
    encoders = {"bpe_1k": load_encoder(model), "bpe_2k": load_encoder(folder), "other": load_encoder(model)}
    curves = curves_of(report_on(encoders, DOCUMENTS, [], []))
    names = {series.name: series.x for series in curves["tokens per word (falls)"]}
    assert names == {"bpe, all": (318.0, 320.0), "other, all": (320.0,)}
