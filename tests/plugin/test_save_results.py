import multiprocessing
import queue

import pytest

from megatron_ru.plugin.run import run_seams
from megatron_ru.plugin.save_results import save_result_seams
from tests.plugin.test_run import arguments


@pytest.fixture
def writer():
    return pytest.importorskip("megatron.core.dist_checkpointing.strategies.filesystem_async")


def test_a_synchronous_save_starts_no_process_for_its_results(writer):
    before = writer.get_write_results_queue
    seams = save_result_seams()
    assert [seam.install() for seam in seams] == [False, True]
    try:
        results = writer.get_write_results_queue(mp_mode="spawn")
        results.put({0: "written"})
        assert writer.get_write_results_queue() is results
        assert (type(results), results.get_nowait()) == (queue.Queue, {0: "written"})
        assert multiprocessing.active_children() == []
    finally:
        for seam in seams:
            seam.undo()
    assert writer.get_write_results_queue is before


@pytest.mark.parametrize(("asynchronous", "replaced"), [(False, True), (True, False)])
def test_of_a_run_whose_saves_are_synchronous(asynchronous, replaced):
    targets = {seam.target.partition(":")[2] for seam in run_seams(arguments(async_save=asynchronous))}
    assert ("get_write_results_queue" in targets) == replaced
