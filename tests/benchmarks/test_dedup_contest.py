import json
from collections import Counter

import pytest

from megatron_ru.benchmarks.dedup_contest import make_corpus, run


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "paragraphs.jsonl"
    lines = [json.dumps({"text": "\n".join(f"абзац {n} " * 9 for n in range(start, start + 5))}) for start in range(40)]
    source.write_text("\n".join(lines))
    return make_corpus([str(source)], tmp_path / "corpus", total=500)


def test_corpus_has_the_share_of_copies(files):
    texts = [json.loads(line)["text"] for path in files for line in path.open(encoding="utf-8")]
    assert len(texts) == 500
    assert len(set(texts)) == 370
    assert max(Counter(texts).values()) > 1


@pytest.mark.slow
def test_all_keep_the_same_number(files, tmp_path):
    for package in ("duckdb", "datatrove"):
        pytest.importorskip(package)
    found = {name: kept for name, _, _, kept in run(files, tmp_path / "scratch", repeats=1)}
    assert set(found.values()) == {370}
    assert len(found) == 5
