import re
import sqlite3
from itertools import islice

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.wordnet import plain_text, wordnet_documents

SENSES = [
    (1, "медведь", "{{зоол.|ru}} [[крупный|крупное]] хищное [[млекопитающее]] ([[Ursus]]) "
        "{{пример|Белый {{выдел|медве́дь}} крупнее бурого.}}"),
    (1, "мишка", "{{разг.|ru}} то же, что [[медведь]] "
        "{{пример|Вот {{выдел|мишка}}.|[[Пушкин|А. Пушкин]]|Письма|1830}}"),
    (2, "медведь", "{{п.|ru}} неуклюжий человек<!-- 2 --> {{пример|}}\n#"),
    (3, "зверь", "дикое ''животное''{{-}}хищник {{итп}} {{пример|Зверь ушёл.|автор=[[Бунин]]|дата=1901}}"),
    (4, "пустое", ""),
    (5, "метка", "{{разг.|ru}}"),
]  # fmt: skip
EXPECTED = {
    "медведь": "медведь:\n"
    "1. зоол. крупное хищное млекопитающее (Ursus). Например: «Белый медведь крупнее бурого.» "
    "Синонимы: мишка. Обобщающие слова: зверь.\n"
    "2. перен. неуклюжий человек.",
    "мишка": "мишка — разг. то же, что медведь. Например: «Вот мишка.» (А. Пушкин). Синонимы: медведь. "
    "Обобщающие слова: зверь.",
    "зверь": "зверь — дикое животное — хищник и т. п. Например: «Зверь ушёл.» (Бунин).",
}


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "wordnet.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE synsets(synset_id INTEGER, lemma TEXT, definition TEXT)")
        connection.execute("CREATE TABLE hypernyms(sid INTEGER, hypersid INTEGER)")
        connection.executemany(
            "INSERT INTO synsets VALUES (?, ?, ?)",
            [(synset, word, f"{word}~ru~{word}~ru~{text}~17~42") for synset, word, text in SENSES],
        )
        connection.execute("INSERT INTO hypernyms VALUES (1, 3)")
    connection.close()
    return path


def test_an_entry_becomes_sentences(database):
    documents = list(wordnet_documents(database))
    assert {document.text.split(" — ")[0].split(":")[0]: document.text for document in documents} == EXPECTED
    assert documents[0].fields == {"domain": "dictionary", "source": "wiki-ru-wordnet"}


def test_the_order_is_always_the_same_and_nothing_is_written(database):
    before = sorted(database.parent.iterdir())
    assert [document.text[:5] for document in wordnet_documents(database)] == ["медве", "зверь", "мишка"]
    assert sorted(database.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("[[Файл|подпись]] и [[слово]]", "подпись и слово"),
        ("{{помета|о {{выдел|людях}}}} злой", "о людях злой"),
        ("{{действие|бегать|ru}}", "действие по значению глагола бегать"),
        ("{{неизвестное|a|b}} слово", "слово"),
        ("H<sub>2</sub>O&nbsp;— вода<ref name='a'>см.</ref>", "H2O — вода"),
        ("'''жирно''' и ''косо''", "жирно и косо"),
        ("за́мок {{", "замок"),
    ],
)
def test_markup_is_resolved(wikitext, text):
    assert plain_text(wikitext) == text


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wiki-ru-wordnet.*pip install 'megatron-ru\[demo\]'"):
        next(wordnet_documents())


def test_a_damaged_database_is_named(tmp_path):
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"cannot read the dictionary .*broken\.db"):
        next(wordnet_documents(tmp_path / "broken.db"))
    with pytest.raises(UserError, match=r"cannot read the dictionary .*absent\.db"):
        next(wordnet_documents(tmp_path / "absent.db"))


def test_the_real_dictionary_is_russian_text_without_markup():
    pytest.importorskip("wiki_ru_wordnet")
    texts = [document.text for document in islice(wordnet_documents(), 2000)]
    assert not [text for text in texts if re.search(r"\{\{|\}\}|\[\[|\]\]|''|</?[a-z]", text)]
    letters = "".join(texts)
    cyrillic = len(re.findall(r"[а-яё]", letters, flags=re.I))
    assert cyrillic > 0.9 * len(re.findall(r"\w", letters))
    assert len(letters) > 400_000
