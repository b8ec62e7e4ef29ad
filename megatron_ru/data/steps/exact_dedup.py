"""Documents with the same text: a task takes all digests of one range, sorts them and finds the equal ones.

The map-reduce of the thesis, without its shuffle: the digests of each segment lie sorted, so that a range of them is
one stretch of each file. Ranges are as many as keep the digests of one within 32 MB.
"""

import numpy as np

from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import DIGESTS, DUPLICATES, open_records
from megatron_ru.data.step import STEPS, Step

_RANGE_BYTES = 32 << 20


def _tasks(run: Run) -> int:
    documents = run.outcome("read").counts["documents"]
    return max(1, -(-documents * DIGESTS.itemsize // _RANGE_BYTES))


def _run(run: Run, task: int) -> Outcome:
    tasks = _tasks(run)
    low, high = (int(bound * 2**64) // tasks for bound in (task, task + 1))
    parts, segments = [], []
    for number, entry in enumerate(run.files("read", kind="digests")):
        records = open_records(entry["path"], DIGESTS)
        first = int(np.searchsorted(records["high"], np.uint64(low)))
        last = len(records) if high >= 2**64 else int(np.searchsorted(records["high"], np.uint64(high)))
        parts.append(np.array(records[first:last]))
        segments.append(np.full(last - first, number, dtype=np.uint32))
    found = np.concatenate(parts)
    duplicates = find_duplicates(found["high"], found["low"], np.concatenate(segments), found["line"])
    outcome = Outcome()
    outcome.counts["documents"] = len(found)
    outcome.dropped["duplicate"] = len(duplicates)
    with hashed_output(run.step_folder("exact_dedup"), f"{task:06d}.duplicates", outcome, kind="duplicates") as stream:
        stream.write(duplicates.tobytes())
    return outcome


def find_duplicates(high: np.ndarray, low: np.ndarray, segments: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """DUPLICATES among digests given as two halves, with their places; the first of each kind is kept.

    The arrays stand in the order of places among equal digests.
    """
    # Runs that are sorted already: the stable sort merges them.
    order = np.argsort(high, kind="stable")
    high, low = high[order], low[order]
    same_high = high[1:] == high[:-1]
    if np.any(low[1:][same_high] != low[:-1][same_high]):
        # Two texts share a half; sorted by both.
        inner = np.lexsort((np.arange(len(order)), low, high))
        order, high, low = order[inner], high[inner], low[inner]
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    dropped, kept = order[same], order[first[same]]
    records = np.empty(len(dropped), dtype=DUPLICATES)
    records["segment"], records["line"] = segments[dropped], lines[dropped]
    records["kept_segment"], records["kept_line"] = segments[kept], lines[kept]
    return records[np.lexsort((records["line"], records["segment"]))]


STEPS.register("exact_dedup")(
    Step(
        place=20,
        version=1,
        wanted=lambda config: config.exact_dedup,
        settings=lambda config: None,
        tasks=_tasks,
        run=_run,
    )
)
