import datetime
import json

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.jsonl import MalformedLines, read_documents, read_lines

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path, columns, **options):
    parquet.write_table(arrow.table(columns), path, **options)
    return str(path)


def test_rows_are_documents_with_their_numbers_and_other_fields(tmp_path):
    texts = [f"кошка {number}\n\0«ё»" for number in range(600)]
    path = write(tmp_path / "a.parquet", {"text": texts, "domain": ["ru", "en"] * 300, "n": list(range(600))})
    found = list(read_documents([path]))
    assert [document.text for document in found] == texts
    assert [document.line for document in found] == list(range(1, 601))
    assert found[599].place == f"{path}:600"
    assert dict(found[1].fields) == {"domain": "en", "n": 1}


def test_they_are_the_same_as_from_json_lines(tmp_path):
    records = [{"text": "ёж", "score": 0.5, "tags": ["a", "б"], "none": None}, {"text": "", "score": 2.0}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = arrow.Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "a.parquet")
    lines, rows = (list(read_documents([tmp_path / f"a.{kind}"])) for kind in ("jsonl", "parquet"))
    assert [one.text for one in rows] == [one.text for one in lines]
    assert dict(rows[0].fields) == dict(lines[0].fields)


def test_only_one_column_is_read_when_only_one_is_wanted(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["а", "б"], "big": ["x" * 1000] * 2})
    assert [line.content for line in read_lines([path], "text")] == ['{"text":"а"}'.encode(), '{"text":"б"}'.encode()]


def test_a_text_that_is_not_utf_8_or_missing_is_malformed_and_named(tmp_path):
    raw = arrow.array([b"\xd0\xba", b'ab "\\\xff\n', None, b"c"], arrow.binary())
    broken = arrow.Array.from_buffers(arrow.string(), 4, raw.buffers())
    path = write(tmp_path / "a.parquet", {"text": broken})
    reports: list[str] = []
    found = list(read_documents([path], malformed=MalformedLines(skip=True, report=reports.append)))
    assert [document.text for document in found] == ["к", "c"]
    assert reports[0].startswith(f"{path}:2: not UTF-8: byte 0xff at column ")
    assert reports[1] == f"{path}:3: field 'text' should be a string, found null (left out)"


def test_kinds_of_columns(tmp_path):
    columns = {
        "text": arrow.array(["а", "б", "а"]).dictionary_encode(),
        "large": arrow.array(["x", "y", "z"], arrow.large_string()),
        "day": [datetime.date(2026, 11, 24)] * 3,
        "nan": [float("nan"), float("inf"), 1.5],
    }
    found = list(read_documents([write(tmp_path / "a.parquet", columns)]))
    assert [document.text for document in found] == ["а", "б", "а"]
    assert dict(found[0].fields) == {"large": "x", "day": "2026-11-24", "nan": None}
    assert found[2].fields["nan"] == 1.5


def test_values_that_python_or_json_has_not(tmp_path):
    """pandas writes nanoseconds, and scores come with NaN within lists."""
    columns = {
        "text": ["а", "б"],
        "time": arrow.array([1, 2000], arrow.timestamp("ns")),
        "times": arrow.array([[1], []], arrow.list_(arrow.timestamp("ns"))),
        "far": arrow.array([2**31 - 1, 0], arrow.date32()),
        "zone": arrow.array([1, 2], arrow.timestamp("us", "Nowhere/At_all")),
        "scores": [{"all": [1.0, float("nan")]}, {"all": [float("inf")]}],
    }
    first, second = read_documents([write(tmp_path / "a.parquet", columns)])
    assert (first.text, second.text) == ("а", "б")
    assert first.fields["time"] == "1970-01-01 00:00:00.000000001"
    assert second.fields["time"] == "1970-01-01 00:00:00.000002"
    assert first.fields["times"] == ["1970-01-01 00:00:00.000000001"]
    assert (second.fields["far"], second.fields["zone"]) == ("1970-01-01", "2")
    assert (first.fields["scores"], second.fields["scores"]) == ({"all": [1.0, None]}, {"all": [None]})


def test_a_field_within_that_is_not_utf_8_is_malformed_too(tmp_path):
    raw = arrow.array([b"\xff", b"c"], arrow.binary())
    inner = arrow.Array.from_buffers(arrow.string(), 2, raw.buffers())
    path = write(tmp_path / "a.parquet", {"text": ["а", "б"], "tags": arrow.ListArray.from_arrays([0, 1, 2], inner)})
    with pytest.raises(UserError, match=r"a\.parquet:1: not UTF-8"):
        list(read_documents([path]))
    reports: list[str] = []
    (kept,) = read_documents([path], malformed=MalformedLines(skip=True, report=reports.append))
    assert (kept.text, len(reports)) == ("б", 1)


def test_progress_ends_at_the_size_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["кошка"] * 1000}, row_group_size=100)
    positions = [line.position for line in read_lines([path])]
    assert positions == sorted(positions)
    assert positions[-1] == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize("keep", [0, 50, 0.5])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, keep):
    path = tmp_path / "a.parquet"
    write(path, {"text": [f"кошка {number}" for number in range(5000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep < 1 else keep])
    with pytest.raises(UserError, match=r"a\.parquet is not sound parquet .*; get it again"):
        list(read_documents([path]))


def test_a_missing_column_is_told_at_once(tmp_path):
    path = write(tmp_path / "a.parquet", {"body": ["а"]})
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text' \(its columns: 'body'\)"):
        list(read_lines([path], "text"))
