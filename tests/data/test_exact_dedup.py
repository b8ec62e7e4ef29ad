import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_ru.data import run as run_module
from megatron_ru.data.pipeline import run_pipeline
from megatron_ru.data.run import Run
from megatron_ru.data.segments import sorted_digests
from megatron_ru.data.steps import exact_dedup
from megatron_ru.data.steps.exact_dedup import find_duplicates

# So few that halves of digests meet each other.
HALVES = st.integers(0, 3)


@given(st.lists(st.tuples(HALVES, HALVES), max_size=60))
def test_the_first_of_equal_digests_stays_even_where_halves_collide(pairs):
    high, low = (np.array([pair[half] for pair in pairs], dtype=np.uint64) for half in (0, 1))
    places = np.arange(len(pairs), dtype=np.uint32)
    found = find_duplicates(high, low, places // 7, places % 7)
    first = {}
    expected = []
    for place, pair in enumerate(pairs):
        if pair in first:
            kept = first[pair]
            expected.append((place // 7, place % 7, kept // 7, kept % 7))
        first.setdefault(pair, place)
    assert [tuple(record) for record in found.tolist()] == sorted(expected)


def test_digests_lie_sorted_with_equal_ones_in_order():
    digests = b"".join(hashlib.md5(str(n % 5).encode()).digest() for n in range(20))
    found = sorted_digests(digests, np.arange(20, dtype=np.uint32))
    assert (np.diff(found["high"].astype(object)) >= 0).all()
    for start in range(0, 20, 4):
        lines = found["line"][start : start + 4].tolist()
        assert lines == sorted(lines)
        assert len({n % 5 for n in lines}) == 1
    whole = hashlib.md5(str(found["line"][0] % 5).encode()).hexdigest()
    assert f"{found['high'][0]:016x}{found['low'][0]:016x}" == whole


def test_many_ranges_find_what_one_finds(config_of, monkeypatch):
    one, many = config_of("one", tokens=None, packing=None, mixture=None), config_of(
        "many", tokens=None, packing=None, mixture=None
    )  # fmt: skip
    run_pipeline(one)
    monkeypatch.setattr(exact_dedup, "_RANGE_BYTES", 700)
    run_pipeline(many)
    assert len(Run.load(many.output).files("exact_dedup")) > 10
    texts = [
        [entry["xxh3_128"] for entry in Run.load(config.output).files("texts", kind="shard")] for config in (one, many)
    ]
    assert texts[0] == texts[1]
    assert run_module.Run is Run


def text_at(place):
    path, _, line = place.removeprefix("same text as ").rpartition(":")
    content = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
    return json.loads(content.splitlines()[int(line) - 1])["text"]


def test_twins_are_named_in_the_samples(config_of, corpus):
    config = config_of(tokens=None, packing=None, mixture=None)
    run_pipeline(config)
    tasks = sorted(Run.load(config.output).step_folder("texts").glob("tasks/*.json"))
    found = [sample for task in tasks for sample in json.loads(task.read_text())["outcome"]["samples"]]
    samples = [sample for sample in found if sample["reason"] == "duplicate"]
    # Pieces of one file are read by tasks of their own.
    assert len({sample["place"].rpartition(":")[0] for sample in samples}) < len(tasks)
    assert len({sample["place"] for sample in samples}) > len(tasks)
    for sample in samples:
        assert sample["place"] != sample["text"].removeprefix("same text as ")
        assert text_at(sample["place"]) == text_at(sample["text"])
