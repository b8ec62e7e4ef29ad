"""Russian dictionary entries as documents: the text of the demo.

The package wiki-ru-wordnet carries the Russian Wiktionary's definitions as an SQLite file of two tables,
synsets(synset_id, lemma, definition) and hypernyms(sid, hypersid); a definition is wikitext between
tildes. The package is under the MIT licence, the Wiktionary's text under CC BY-SA.
"""

import hashlib
import html
import importlib.util
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.document import Document


def wordnet_documents(database: Path | None = None) -> Iterator[Document]:
    """Yields one document for each word that has a definition, always in the same order.

    The order is that of a hash of the word: any stretch of it is a fair sample of the whole, which the
    split of a dataset into training and validation relies on. Raises UserError when the package is
    missing or its database (given or found) cannot be read.
    """
    path = _installed_database() if database is None else database
    try:
        # Opened so that nothing is written beside it: the folder may belong to root.
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            senses = connection.execute("SELECT synset_id, lemma, definition FROM synsets ORDER BY rowid").fetchall()
            broader = connection.execute("SELECT sid, hypersid FROM hypernyms ORDER BY rowid").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"cannot read the dictionary {path} ({error}); install wiki-ru-wordnet again") from None
    yield from _documents(senses, broader)


def plain_text(wikitext: str) -> str:
    """`wikitext` with its markup resolved: links to their words, labels to themselves, the rest left out."""
    text = re.sub(r"<!--.*?-->|<ref.*?(?:/>|</ref>)|<math>.*?</math>", "", wikitext, flags=re.S)
    text = re.sub(r"</?[a-z]+[^<>]*>", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    # From the inside out, since templates lie in templates.
    while (resolved := _TEMPLATE.sub(_resolve_template, text)) != text:
        text = resolved
    text = html.unescape(re.sub(r"'{2,}", "", text)).replace("\N{COMBINING ACUTE ACCENT}", "")
    text = re.sub(r"[{}\[\]|]+|^[#*:;\s]+|[#*:;\s]+$", " ", text, flags=re.M)
    return re.sub(r"\s+([,.;:!?)])", r"\1", " ".join(text.split()))


_TEMPLATE = re.compile(r"\{\{([^{}|]*)((?:\|[^{}]*)?)\}\}")

# Templates that stand for a word or a sign; {{п.}} marks a figurative sense.
_WORDS = {
    "-": " — ", "--": " — ", "тире": " — ", "п.": "перен.", "итп": "и т. п.", "итд": "и т. д.", "?": "",
    "мн": "мн. ч.", "ед": "ед. ч.", "умласк": "уменьш.-ласк.", "мат": "матем.",
}  # fmt: skip

# Templates whose meaning is a sentence about the word in their first argument.
_PHRASES = {
    "действие": "действие по значению глагола {}",
    "свойство": "свойство по значению прилагательного {}",
    "соотн.": "относящийся к понятию «{}»",
    "наречие": "наречие к {}",
    "женск.": "женск. к {}",
    "умласк": "уменьш.-ласк. к {}",
    "прич.": "причастие от {}",
    "страд.": "страд. к {}",
    "нареч.": "наречие к {}",
}


def _resolve_template(found: re.Match[str]) -> str:
    name = found[1].strip()
    arguments = [part.strip() for part in found[2].split("|")[1:]]
    plain = [part for part in arguments if part and "=" not in part and part not in ("ru", "-")]
    if name in ("выдел", "помета", "помета.", "рег.", "=", "сокр.", "аббр."):
        return ", ".join(plain)
    if name == "lang":
        return plain[-1] if plain else ""
    if name in _PHRASES and plain:
        return _PHRASES[name].format(plain[0])
    if name in _WORDS:
        return _WORDS[name]
    # The dictionary's labels are abbreviations: {{зоол.|ru}}, {{разг.}}.
    return name if re.fullmatch(r"[а-яё][а-яё. -]*\.|сленг", name) else ""


def _documents(senses: list[tuple[int, str, str]], broader: list[tuple[int, int]]) -> Iterator[Document]:
    synset_words: dict[int, dict[str, None]] = defaultdict(dict)
    entries: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for synset, word, record in senses:
        synset_words[synset][word] = None
        entries[word][synset].append(record)
    parents: dict[int, list[int]] = defaultdict(list)
    for synset, parent in broader:
        parents[synset].append(parent)
    for word in sorted(entries, key=lambda word: hashlib.md5(word.encode("utf-8")).digest()):
        lines = []
        for synset, records in entries[word].items():
            synonyms = [other for other in synset_words[synset] if other != word]
            kinds = dict.fromkeys(
                other for parent in parents[synset] for other in synset_words[parent] if other != word
            )
            for record in records:
                if sense := _sense(record):
                    lines.append(sense + _related("Синонимы", synonyms) + _related("Обобщающие слова", list(kinds)))
        if lines:
            yield Document(text=_entry(word, lines), fields={"domain": "dictionary", "source": "wiki-ru-wordnet"})


def _entry(word: str, senses: list[str]) -> str:
    if len(senses) == 1:
        return f"{word} — {senses[0]}"
    return "\n".join([f"{word}:", *(f"{number}. {sense}" for number, sense in enumerate(senses, start=1))])


def _sense(record: str) -> str:
    """The definition and its examples as sentences; empty when there is no definition.

    A record is `lemma~language~lemma~language~wikitext~number~number`.
    """
    wikitext = "~".join(record.split("~")[4:-2])
    definition, examples = _split_examples(wikitext)
    text = plain_text(definition)
    # A label alone ("разг.") explains nothing.
    if not re.search(r"[а-яё]{2,}(?![а-яё]*\.)", text, flags=re.I):
        return ""
    sentences = [text.rstrip(" .,;—") + "."]
    quotes = [quote for example in examples if (quote := _quotation(example))]
    if quotes:
        sentences.append("Например: " + " ".join(quotes))
    return " ".join(sentences)


def _split_examples(wikitext: str) -> tuple[str, list[str]]:
    """The wikitext without its {{пример|...}} templates, and the insides of these."""
    rest, examples, position = [], [], 0
    while (start := wikitext.find("{{пример", position)) >= 0:
        rest.append(wikitext[position:start])
        end, depth = start, 0
        for brace in re.finditer(r"\{\{|\}\}", wikitext[start:]):
            depth += 1 if brace[0] == "{{" else -1
            end = start + brace.end()
            if depth == 0:
                break
        examples.append(wikitext[start:end].removeprefix("{{пример").removesuffix("}}").removeprefix("|"))
        position = end
    return "".join([*rest, wikitext[position:]]), examples


def _quotation(example: str) -> str:
    """«Text» (author), from `text|author|title|...` or with named parts; empty when there is no text."""
    # Bars inside links and templates part nothing.
    parts = re.split(r"\|(?![^\[\]{}]*(?:\]\]|\}\}))", example)
    named = dict(part.split("=", 1) for part in parts if re.match(r"[а-яё]+=", part))
    plain = [part for part in parts if not re.match(r"[а-яё]+=", part)]
    text = plain_text(plain[0]) if plain else ""
    author = plain_text(named.get("автор") or (plain[1] if len(plain) > 1 else ""))
    if not text:
        return ""
    return f"«{text}»" + (f" ({author})." if author else "")


def _related(title: str, words: list[str]) -> str:
    return f" {title}: {', '.join(words)}." if words else ""


def _installed_database() -> Path:
    package = importlib.util.find_spec("wiki_ru_wordnet")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "the demo's text needs the package wiki-ru-wordnet, which is not installed: pip install 'megatron-ru[demo]'"
        )
    return Path(package.submodule_search_locations[0]) / "database" / "wikiwordnet.db"
