"""Reading in blocks leaves what reading line by line would."""

import gzip
import json

import pytest

from megatron_ru.data import sources
from megatron_ru.data.config import Input, PipelineConfig
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run
from megatron_ru.data.sources import Source
from megatron_ru.data.steps import read
from megatron_ru.text import json_blocks

LINES = [
    '{"text": "первый \\"документ\\"\\n", "id": 1}', "", '{"id": 2, "text": "second"}', "   ", '{"text": "\\u0431"}',
    '{"text": "б"}', '{"text": "a", "text": "second"}', '{"text": "нуль\\u0000"}', "broken", '{"text": 5}',
    '{"text": "x\ty"}', '{"text": "\\/"}', '{"text": "/"}', '{"text": ""}', '{"text": "👩 \\\\ é"}\r',
]  # fmt: skip


def corpus(folder, copies=20):
    content = ("\ufeff" + "\n".join(LINES * copies)).encode() + b'\n{"text": "\xd0"}\n{"text": "no line break"}'
    (folder / "a.jsonl").write_bytes(content)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(content))
    return folder


def config(folder, output, **changes):
    files = (str(folder / "a.jsonl"), str(folder / "b.jsonl.gz"))
    settings = {"malformed": "skip", "length": None, "shard_megabytes": 0.002} | changes
    return PipelineConfig(output=str(folder / output), inputs=(Input(domain="d", files=files),), **settings)


def found(folder):
    run = Run.load(folder)
    outcomes = [run.outcome(name).to_json() for name in run.step_names]
    return [json.dumps(outcome).replace(str(folder), "OUT") for outcome in outcomes]


@pytest.mark.parametrize("block", [1, 100, 1 << 19])
@pytest.mark.parametrize("largest", [0, 8 << 20])
def test_blocks_of_any_size_and_the_parser_alone_leave_the_same_files(tmp_path, monkeypatch, block, largest):
    corpus(tmp_path)
    run_pipeline(config(tmp_path, "plain"))
    monkeypatch.setattr(sources, "_BLOCK", block)
    monkeypatch.setattr(json_blocks, "_LARGEST", largest)
    monkeypatch.setattr(read, "_LINES_AT_ONCE", 3)
    run_pipeline(config(tmp_path, "other"))
    assert found(tmp_path / "plain") == found(tmp_path / "other")
    counts = Run.load(tmp_path / "other").outcome("read").counts
    # Blank lines at the end of an archive are not seen; there are none here.
    assert (counts["lines"], counts["blank_lines"]) == (2 * (20 * len(LINES) + 2), 2 * 20 * 2)
    assert (counts["documents"], counts["documents_with_nul"]) == (2 * (20 * 10 + 1), 2 * 20)


def test_segments_end_with_so_many_lines(tmp_path, monkeypatch):
    corpus(tmp_path)
    run_pipeline(config(tmp_path, "one", shard_megabytes=100))
    monkeypatch.setattr(read, "_SEGMENT_LINES", 7)
    run_pipeline(config(tmp_path, "many", shard_megabytes=100))
    runs = [Run.load(tmp_path / name) for name in ("one", "many")]
    lines = [entry for entry in runs[1].files("read", kind="lines") if entry["task"] == 0]
    assert [entry["bytes"] for entry in lines] == [7 * 8] * 43 + [8]
    assert [entry["first_line"] for entry in lines] == list(range(0, 302, 7))
    texts = [b"".join(entry["path"].read_bytes() for entry in run.files("texts", kind="shard")) for run in runs]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_blocks_hold_the_lines_of_a_source(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr(sources, "_BLOCK", block)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([b"one", b"", b"three is long", b"4"]) + end)
    size = path.stat().st_size
    for middle in range(size + 1):
        for start, stop in ((0, middle), (middle, size)):
            source = Source(domain="d", file=str(path), start=start, end=stop, plain=True, any_language=False)
            blocks = list(source.blocks())
            assert b"".join(blocks) == b"".join(content for _, content in source.lines())
            assert all(part.endswith(b"\n") for part in blocks[:-1])
