import gzip
import importlib.util
import json
import sys

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.text import jsonl
from megatron_ru.text.document import Document
from megatron_ru.text.jsonl import MalformedLines, read_documents, read_lines, write_documents

GOOD = b'{"text": "\xd0\xbf\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82\\n", "domain": "ru"}\n'

# Line, then what is said about it.
MALFORMED = [
    (b'{"text": "\xd0"}', r"not UTF-8: byte 0xd0 at column 11"),
    (b'{"text": "a"', r"not JSON: .*column"),
    (b"text", r"not JSON"),
    (b'{"text": "a"} {"text": "b"}', r"not JSON"),
    (b'["a"]', r"expected a JSON object, found an array"),
    (b'"a"', r"expected a JSON object, found a string"),
    (b"null", r"expected a JSON object, found null"),
    (b"{}", r"no field 'text' \(its fields: none\)"),
    (b'{"body": "a", "id": 1}', r"no field 'text' \(its fields: 'body', 'id'\)"),
    (b'{"text": null}', r"field 'text' should be a string, found null"),
    (b'{"text": 5}', r"field 'text' should be a string, found a number"),
    (b'{"text": ["a"]}', r"field 'text' should be a string, found an array"),
    (b'{"text": "\\ud83d"}', r"surrogate"),
    (b'{"text": "a", "score": NaN}', r"not JSON"),
    (b"[" * 100_000, r"not JSON"),
]


def write(path, content: bytes) -> str:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_documents_come_with_their_place_and_other_fields(tmp_path, name):
    file = write(tmp_path / name, GOOD + b"\r\n  \n" + b'{"text": ""}')
    assert list(read_documents([file, file])) == 2 * [
        Document(text="привет\n", file=file, line=1, fields={"domain": "ru"}),
        Document(text="", file=file, line=4),
    ]


def test_a_byte_order_mark_and_carriage_returns_are_no_harm(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [document.text for document in read_documents([file])] == ["a", "b"]


def test_another_field_may_hold_the_text(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"text": 1, "body": "b"}')
    assert [(document.text, document.fields) for document in read_documents([file], "body")] == [("b", {"text": 1})]


def test_lines_know_how_far_the_file_has_been_read(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD * 3)
    assert [line.position for line in read_lines([file])][-1] == 3 * len(GOOD)


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_a_malformed_line_ends_the_reading_with_its_place(tmp_path, line, reason):
    file = write(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD)
    documents = read_documents([file])
    assert next(documents).line == 1
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + reason + ".*--skip-malformed"):
        next(documents)


def test_malformed_lines_that_are_skipped_are_each_reported_and_counted(tmp_path):
    content = b"".join(line + b"\n" + GOOD for line, _ in MALFORMED)
    file = write(tmp_path / "a.jsonl.gz", content)
    reports: list[str] = []
    malformed = MalformedLines(skip=True, report=reports.append)
    documents = list(read_documents([file], malformed=malformed))
    assert [document.line for document in documents] == [2 * number for number in range(1, len(MALFORMED) + 1)]
    assert malformed.count == len(MALFORMED)
    assert [report.split(": ")[0] for report in reports] == [
        f"{file}:{2 * number - 1}" for number in range(1, len(MALFORMED) + 1)
    ]


def test_reports_go_to_stderr_unless_said_otherwise(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", b"{}\n")
    assert list(read_documents([file], malformed=MalformedLines(skip=True))) == []
    assert capsys.readouterr().err == f"{file}:1: no field 'text' (its fields: none) (left out)\n"


def test_json_of_the_standard_library_judges_as_orjson_does(monkeypatch):
    pytest.importorskip("orjson")
    lines = [line for line, _ in MALFORMED] + [
        GOOD,
        b'{"text": "\\ud83d\\ude00", "n": 123456789012345678901234567890}',
        b'{"text": "a", "n": 1e400}',
    ]
    judged = [_judge(jsonl, line) for line in lines]
    assert judged == [None] * len(MALFORMED) + ["привет\n", "😀", None]
    monkeypatch.setitem(sys.modules, "orjson", None)
    # A second copy of the module, for others hold on to the classes of the first.
    specification = importlib.util.spec_from_file_location("jsonl_without_orjson", jsonl.__file__)
    plain = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, plain)
    specification.loader.exec_module(plain)
    assert plain._loads.__module__ == specification.name
    assert [_judge(plain, line) for line in lines] == judged


def _judge(module, line: bytes) -> str | None:
    try:
        return module.parse_object(line)["text"]
    except module.MalformedLine:
        return None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_cut_off_archive_is_an_error(tmp_path, suffix, keep):
    path = tmp_path / f"a.jsonl{suffix}"
    # Each line differs, so that half of the archive is still many lines.
    write(path, b"".join(b'{"text": "%d"}\n' % (number**5) for number in range(20_000)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+ is cut off"):
        list(read_documents([path]))


def test_files_that_cannot_be_read_are_named(tmp_path):
    cases = {
        tmp_path / "absent.jsonl": "cannot read .*absent.jsonl: No such file",
        tmp_path: "is a folder",
        tmp_path / "plain.jsonl.gz": r"plain.jsonl.gz is not sound gzip \(Not a gzipped file",
        tmp_path / "plain.jsonl.zst": "plain.jsonl.zst is not sound zstd",
    }
    (tmp_path / "plain.jsonl.gz").write_bytes(GOOD)
    (tmp_path / "plain.jsonl.zst").write_bytes(GOOD)
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            list(read_documents([path]))


def test_damage_inside_an_archive_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path, GOOD * 1000)
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # in the check sum
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not sound gzip .*CRC"):
        list(read_documents([path]))


def test_without_zstandard_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst needs .*zstandard.*pip install 'megatron-ru\[data\]'"):
        list(read_documents([tmp_path / "a.jsonl.zst"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_documents_that_are_written_can_be_read_again(tmp_path, name):
    documents = [Document(text="ёж\n", fields={"domain": "ru"}), Document(text="")]
    assert write_documents(tmp_path / "sub" / name, iter(documents)) == 2
    again = list(read_documents([tmp_path / "sub" / name]))
    assert [(document.text, document.fields) for document in again] == [("ёж\n", {"domain": "ru"}), ("", {})]
    first = (tmp_path / "sub" / name).read_bytes()
    write_documents(tmp_path / name, iter(documents))
    assert (tmp_path / name).read_bytes() == first


def test_what_is_written_stays_legible(tmp_path):
    write_documents(tmp_path / "a.jsonl", [Document(text="ёж")])
    assert (tmp_path / "a.jsonl").read_text() == json.dumps({"text": "ёж"}, ensure_ascii=False) + "\n"


def test_nothing_is_left_of_a_writing_that_failed(tmp_path):
    def documents():
        yield Document(text="a")
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_documents(tmp_path / "a.jsonl.gz", documents())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/a\.jsonl"):
        write_documents(tmp_path / "file" / "a.jsonl", [])
