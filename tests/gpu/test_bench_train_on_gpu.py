"""A small model against the peers on a GPU, from end to end."""

import json

import pytest

from megatron_ru.commands.main import main

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(900)
def test_every_contender_that_can_run_is_measured(tmp_path, capsys):
    against = ["compile", "mcore", "roof"]
    words = ["--variant", "llama3_8b", "--layers", "1", "--sequence", "1024", "--micro-batch", "1", "--steps", "10"]
    path = tmp_path / "train.json"
    assert main(["bench", "train", *words, "--against", ",".join(against), "--json", str(path)]) == 0
    rows = {row["contender"]: row for row in json.loads(path.read_text())["rows"]}
    assert [name for name, row in rows.items() if row["status"] != "ok"] == [], rows
    assert list(rows) == ["megatron_ru", *against]
    for row in rows.values():
        document = row["document"]
        busy = sum(one["microseconds"] for one in document["causes"])
        gaps = sum(document["gap_microseconds"].values())
        # Kernels and gaps are the traced steps; those that are not traced are about as long.
        assert 0.4 < (busy + gaps) / 1e6 / document["begin_to_begin_seconds"] < 3, row
        assert document["peak_memory_gib"] > 1
        by_cause = {one["cause"]: one["microseconds"] for one in document["causes"]}
        assert by_cause["GEMM"] > by_cause["attention"] > 0
        assert by_cause.get("other", 0.0) < 0.1 * busy
    parts = {one["part"] for one in rows["megatron_ru"]["document"]["causes"] if one["cause"] == "optimizer"}
    assert parts == {"update"}
    products = {name: row["document"]["causes"][0]["microseconds"] for name, row in rows.items()}
    # The same products everywhere.
    assert max(products.values()) < 1.5 * min(products.values())
