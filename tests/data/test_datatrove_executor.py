import pytest

from megatron_ru.data.datatrove_executor import run_through_datatrove
from megatron_ru.data.execution import prepare, run_share
from megatron_ru.data.pipeline import run_pipeline, write_manifest
from megatron_ru.data.run import Run
from megatron_ru.data.step import STEPS
from megatron_ru.foundation.errors import UserError
from tests.data.conftest import outputs


@pytest.mark.parametrize("world", [1, 3])
def test_shares_of_ranks_make_the_files_of_a_local_run(config_of, world):
    here, there = config_of("here"), config_of("there")
    run_pipeline(here)
    run = prepare(there)
    for name in run.step_names:
        for rank in reversed(range(world)):
            run_share(there.output, name, rank, world)
    run.close("publish", STEPS["publish"].tasks(run))
    write_manifest(run)
    assert outputs(Run.load(there.output).folder) == outputs(Run.load(here.output).folder)


def test_a_share_that_is_missing_is_named(config_of):
    config = config_of()
    run = prepare(config)
    run_share(config.output, "read", 0, 2)
    with pytest.raises(UserError, match=r"task 1 of \d+ of the step read is not done"):
        run_share(config.output, "exact_dedup", 0, 1)
    assert run.step_names[0] == "read"


@pytest.mark.slow
def test_datatrove_on_this_machine(config_of):
    pytest.importorskip("datatrove")
    here, there = config_of("here"), config_of("there")
    run_pipeline(here)
    assert "manifest.json: read, exact_dedup" in run_through_datatrove(there, slurm=False, tasks=3, workers=2)
    found = outputs(Run.load(there.output).folder)
    assert any(name.startswith("logs/") for name in found)
    assert {k: v for k, v in found.items() if not k.startswith("logs/")} == outputs(Run.load(here.output).folder)


def test_at_least_one_rank(config_of):
    with pytest.raises(UserError, match="the number of ranks is 0"):
        run_through_datatrove(config_of(), slurm=False, tasks=0)
