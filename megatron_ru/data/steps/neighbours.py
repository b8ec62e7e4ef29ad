"""Within each cluster, the nearest farther neighbour of each document; a task takes some clusters."""

import numpy as np

from megatron_ru.data.outcome import Outcome, hashed_output
from megatron_ru.data.run import Run
from megatron_ru.data.segments import open_records
from megatron_ru.data.semantic import farther_neighbours
from megatron_ru.data.step import STEPS, Step
from megatron_ru.data.vectors import ASSIGNED, NEIGHBOURS, open_vectors

_CLUSTERS = 64


def _tasks(run: Run) -> int:
    return -(-run.outcome("centroids").counts["clusters"] // _CLUSTERS)


def _run(run: Run, task: int) -> Outcome:
    settings = run.config.semantic_dedup
    assert settings is not None
    shards, parts, gathered = [], [], []
    # Noise, -1, comes with the first clusters.
    bounds = np.array([task * _CLUSTERS or -1, (task + 1) * _CLUSTERS])
    vectors = open_vectors(run)
    for number, entry in enumerate(run.files("assign", kind="assigned")):
        records = open_records(entry["path"], ASSIGNED)
        first, last = np.searchsorted(records["cluster"], bounds)
        mine = np.array(records[first:last])
        shards.append(np.full(len(mine), number))
        parts.append(mine)
        gathered.append(vectors[number][mine["row"]])
    shard, records, matrix = map(np.concatenate, (shards, parts, gathered))
    found = np.zeros(len(shard), dtype=NEIGHBOURS)
    found["shard"], found["row"] = shard, records["row"]
    outcome = Outcome()
    for cluster in np.unique(records["cluster"]):
        members = np.flatnonzero(records["cluster"] == cluster)
        if cluster < 0:
            # Like nothing else, so it stays.
            for name, value in (("largest", -1.0), ("kept_shard", -1), ("kept_row", -1)):
                found[name][members] = value
            continue
        result = farther_neighbours(matrix[members], records["cosine"][members], settings.device)
        none = result.neighbour < 0
        partners = members[np.where(none, 0, result.neighbour)]
        found["largest"][members] = result.largest
        found["kept_shard"][members] = np.where(none, -1, shard[partners])
        found["kept_row"][members] = np.where(none, -1, records["row"][partners].astype(np.int64))
        outcome.measure("cluster_documents", np.array([len(members)]))
    found = found[np.lexsort((found["row"], found["shard"]))]
    with hashed_output(run.step_folder("neighbours"), f"{task:06d}.neighbours", outcome, kind="neighbours") as stream:
        stream.write(found.tobytes())
    outcome.counts["documents"] = len(found)
    return outcome


STEPS.register("neighbours")(
    Step(
        place=43,
        version=1,
        wanted=lambda config: config.semantic_dedup is not None,
        settings=lambda config: None,
        tasks=_tasks,
        run=_run,
    )
)
