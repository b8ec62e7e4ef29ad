"""What is found in a block is what the parser finds, line by line."""

import json
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ru.text import json_blocks
from megatron_ru.text.json_blocks import BlockReader
from megatron_ru.text.jsonl import MalformedLine, parse_object, spelling

TEXT = "text"

# Characters at the bounds of everything: escapes, lengths in UTF-8, surrogates, what no line may hold.
CHARACTERS = st.sampled_from([*'abя"\\/\n\r\t\b\f\0\x1f\x7f\x80߿ࠀ퟿￿\U00010000\U0010ffff {}[]:,u', "text", "\\u0041"])
TEXTS = st.lists(CHARACTERS, max_size=12).map("".join)
VALUES = st.one_of(TEXTS, st.integers(), st.floats(), st.none(), st.lists(TEXTS, max_size=2),
                   st.dictionaries(st.sampled_from([TEXT, "a"]), TEXTS, max_size=2))  # fmt: skip
FIELDS = st.lists(st.tuples(st.sampled_from([TEXT, TEXT, "id", "te\\xt", 'te"xt', "\x7f"]), VALUES), max_size=4)


@st.composite
def spelled_objects(draw):
    """An object whose fields may come twice, spelled with or without \\u, with white space and slashes escaped."""

    def word(value):
        found = json.dumps(value, ensure_ascii=draw(st.booleans()))
        return found.replace("/", "\\/") if draw(st.booleans()) else found

    space = draw(st.sampled_from(["", " ", "\t"]))
    members = [word(name) + space + ":" + space + word(value) for name, value in draw(FIELDS)]
    return ("{" + ("," + space).join(members) + "}").encode()


@st.composite
def damaged(draw):
    """One with a byte put in, taken out or replaced: quotes, backslashes, halves of characters."""
    line = bytearray(draw(spelled_objects()))
    place = draw(st.integers(0, len(line)))
    line[place : place + draw(st.integers(0, 1))] = draw(st.sampled_from(
        [b"", b'"', b"\\", b"\\\\", b"\x7f", b"\xc0", b"\xc1\x81", b"\xd0", b"\xe2\x80", b"\xe0\x80\x80",
         b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5", b"\xbf", b"\x00", b"\r", b"{", b"}"]
    ))  # fmt: skip
    return bytes(line)


LINES = st.lists(
    st.one_of(spelled_objects(), spelled_objects(), damaged(), st.sampled_from([b"", b"  ", b'["text"]', b'"text"'])),
    max_size=8,
)


def plain(line, field=TEXT):
    """(spelling, characters) by the parser; None where there is no document."""
    try:
        text = parse_object(line, field)[field]
    except MalformedLine:
        return None
    return spelling(text), len(text)


def check(block, reader=None):
    """How many lines were found; all that were are as the parser finds them."""
    found = (reader or BlockReader(TEXT)).read(block)
    lines = block.splitlines(keepends=True) if b"\r" not in block else [x + b"\n" for x in block.split(b"\n")]
    starts = [0, *found.ends.tolist()]
    assert starts[-1] == len(block)
    for line, spelled in enumerate(found.spellings):
        content = block[starts[line] : starts[line + 1]]
        assert content.count(b"\n") == content.endswith(b"\n")
        if spelled is not None:
            assert plain(content) == (spelled, found.characters[line])
    assert len(lines) >= len(found.spellings)
    return sum(spelled is not None for spelled in found.spellings)


@given(LINES, st.booleans())
@settings(max_examples=200, deadline=None)
@example([b'{"text": "a", "text": null}', b'{"text": null, "text": "a"}'], True)
@example([b'{"text": "a", "x": "b", "text": "c"}', b'{"a": {"text": "b"}, "text": "c"}'], True)
@example([b'{"x": "\\\\", "text": "\\\\\\""}', b'{"text": "a\\\\", "b": "\\""}'], True)
@example([b'{"text": "\x7f", "b": "\x7f"}', b'{"b": "\\u007f", "text": "\x7f"}'], False)
@example([b'{"text": "\xe2\x80', b'\x94"}', b'{"text": "ok"}'], True)
def test_random_and_nasty_lines(lines, ended):
    block = b"\n".join(lines) + (b"\n" if ended else b"")
    if block:
        check(block)


@given(st.lists(st.text(), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_text_has_one_spelling(texts):
    for text in texts:
        if text.encode("utf-8", "ignore").decode() == text:
            assert json.loads(b'"' + spelling(text) + b'"') == text
            assert spelling(text) == json.dumps(text, ensure_ascii=False).encode()[1:-1]


def test_every_sequence_of_bytes_is_judged_as_python_judges_it():
    """All pairs, and all triples and quadruples at the bounds of the classes of bytes."""
    edges = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF,
             0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]  # fmt: skip
    rest = [0x41, 0x80, 0xBF, 0xC2]
    tails = [bytes([a, b]) for a in range(0x80, 256) for b in range(0x80, 256)]
    tails += [bytes([a, b, c]) for a in edges for b in edges for c in rest]
    tails += [bytes([a, b, c, d]) for a in edges[-12:] for b in edges for c in rest for d in rest]
    block = b"".join(b'{"text": "x%by"}\n' % tail for tail in tails)
    found = BlockReader(TEXT).read(block)
    good = 0
    for tail, spelled, characters in zip(tails, found.spellings, found.characters.tolist(), strict=True):
        try:
            text = tail.decode()
        except UnicodeDecodeError:
            assert spelled is None, tail
        else:
            assert (spelled, characters) == (b"x" + tail + b"y", len(text) + 2), tail
            good += 1
    assert good > 2000


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "Мама \\"мыла\\"\\n раму\\\\", "id": 1}',
        '{"id": 1, "text": "long enough to be the longest", "b": [{"text": "no"}]}',
        '{"a":"x","text":"","b":""}',
        '\t{ "text" :\t"a — б 👩" }\r',
        '{"text": "a", "title": "\\"b\\" \\/ \\\\"}',
    ],
)
def test_common_lines_are_found(line):
    reader = BlockReader(TEXT)
    block = (line + "\n").encode() * 5
    # The empty string is found where the reader has learned its place.
    assert check(block, reader) == (0 if '""' in line else 5)


def test_where_the_text_lies_is_learned():
    reader = BlockReader(TEXT)
    check(b'{"a": "x", "text": "the longest one"}\n', reader)
    assert check(b'{"a": "longer than the text", "text": "short"}\n', reader) == 1


def test_texts_full_of_escapes_are_left_to_the_parser_for_some_blocks(monkeypatch):
    monkeypatch.setattr(json_blocks, "_PAUSE", 2)
    reader, good = BlockReader(TEXT), b'{"text": "a"}\n'
    assert check(b'{"text": "\\u0430"}\n' * 3 + good, reader) == 1
    assert [check(good * 4, reader) for _ in range(3)] == [0, 0, 4]
    monkeypatch.setattr(json_blocks, "_LARGEST", 20)
    assert check(good * 4, reader) == 0
    assert check(good, reader) == 1


def test_random_bytes_do_no_harm():
    for _ in range(50):
        check(os.urandom(300))
