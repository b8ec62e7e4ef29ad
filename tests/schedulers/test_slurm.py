"""`megatron-ru launch slurm` on a real Slurm."""

import re

import pytest

from tests.schedulers.cluster import assert_world, ranks_seen, show_rank, wait_for_lines
from tests.schedulers.slurm_cluster import NODES

LIMIT = ("--time", "00:05:00")


@pytest.mark.parametrize("options", [(), ("--torchrun",)], ids=["srun", "torchrun"])
def test_eight_ranks_know_their_place(slurm, hosts, tmp_path, options):
    record = tmp_path / "ranks"
    job = slurm.submit(*LIMIT, "--env", "GREETING=здравствуй $HOME", *options, command=show_rank(record))
    assert slurm.wait(job) == "COMPLETED", slurm.output(job)
    assert_world(record, hosts, NODES, 4)
    assert {rank["GREETING"] for rank in ranks_seen(record)} == {"здравствуй $HOME"}
    # Slurm numbers the GPUs of a node; torchrun's ranks choose theirs by LOCAL_RANK.
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks_seen(record)} == {"0,1,2,3"}
    assert hosts.left(within=5) == {}


def test_array_gives_each_job_its_number_and_port(slurm, tmp_path):
    record = tmp_path / "ranks"
    job = slurm.submit(*LIMIT, "--array", "2-6:2", nodes=1, gpus=2, command=show_rank(record))
    assert slurm.wait_for_array(job) == ["COMPLETED"] * 3
    seen = ranks_seen(record)
    assert sorted((rank["RU_ARRAY_INDEX"], rank["RANK"]) for rank in seen) == [
        (index, rank) for index in "246" for rank in "01"
    ]
    ports = {(rank["RU_ARRAY_INDEX"], rank["MASTER_PORT"]) for rank in seen}
    assert len(ports) == 3, "the two ranks of a job agree"
    assert len({port for _, port in ports}) == 3, "jobs that may share a host do not share a port"


def test_dependent_job_starts_after_the_first_and_not_at_all_after_a_failure(slurm, tmp_path):
    record = tmp_path / "ranks"
    first = slurm.submit(*LIMIT, nodes=1, gpus=1, command=show_rank(record, "sleep", "1"))
    second = slurm.submit(
        *LIMIT, "--dependency", f"afterok:{first}", nodes=1, gpus=1, command=show_rank(record, "exit", "7")
    )
    third = slurm.submit(
        *LIMIT, "--dependency", f"afterok:{second}", nodes=1, gpus=1, command=show_rank(record, "third")
    )
    fourth = slurm.submit(
        *LIMIT, "--dependency", f"afternotok:{second}", nodes=1, gpus=1, command=show_rank(record, "fourth")
    )
    assert slurm.wait(fourth) == "COMPLETED"
    assert [slurm.job(job)["JobState"] for job in (first, second, third)] == ["COMPLETED", "FAILED", "PENDING"]
    assert slurm.job(third)["Reason"] == "DependencyNeverSatisfied"
    # Ranks of four jobs in the order of their lines; all are rank 0.
    assert [rank["words"] for rank in ranks_seen(record)] == [["sleep", "1"], ["exit", "7"], ["fourth"]]


def test_check_says_what_slurm_thinks_and_starts_nothing(slurm, tmp_path):
    record = tmp_path / "ranks"
    good = slurm.launch(*LIMIT, action="--check", command=show_rank(record))
    assert good.returncode == 0, good.stdout
    assert re.search(r"Job \d+ to start at .* on nodes h\[1-2\] in partition gpu", good.stdout), good.stdout
    bad = slurm.launch(*LIMIT, action="--check", nodes=3, command=show_rank(record))
    assert bad.returncode != 0
    assert "Node count specification invalid" in bad.stdout or "node configuration is not available" in bad.stdout
    too_many = slurm.launch(*LIMIT, action="--check", gpus=5, command=show_rank(record))
    assert too_many.returncode != 0
    assert "node configuration is not available" in too_many.stdout
    unknown = slurm.launch(*LIMIT, "--queue", "nowhere", action="--check", command=show_rank(record))
    assert unknown.returncode != 0
    assert "invalid partition specified: nowhere" in unknown.stdout
    assert not record.exists()
    assert slurm.ask("squeue", "--noheader") == ""


def test_submission_that_slurm_refuses_prints_no_id(slurm, tmp_path):
    sent = slurm.launch(*LIMIT, "--queue", "nowhere", command=show_rank(tmp_path / "ranks"))
    assert sent.returncode != 0
    assert "invalid partition" in sent.stdout
    assert not re.search(r"(?m)^\d+$", sent.stdout)


@pytest.mark.parametrize("options", [(), ("--torchrun",)], ids=["srun", "torchrun"])
def test_scancel_leaves_no_process_behind(slurm, hosts, tmp_path, options):
    record = tmp_path / "ranks"
    job = slurm.submit(*LIMIT, *options, gpus=2, command=show_rank(record, "sleep", "600"))
    wait_for_lines(record, 4, lambda: slurm.output(job))
    assert set(hosts.left()) == set(NODES)
    slurm.ask("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    assert hosts.left(within=20) == {}


def test_exit_code_of_a_rank_is_that_of_the_job(slurm, hosts, tmp_path):
    record = tmp_path / "ranks"
    program = 'if [ "$RANK" = 3 ]; then sleep 1; exit 7; fi; exec sleep 600'
    job = slurm.submit(*LIMIT, gpus=2, command=["bash", "-c", f"echo $RANK >>{record}; {program}"])
    assert slurm.wait(job) == "FAILED"
    assert slurm.job(job)["ExitCode"] == "7:0"
    assert hosts.left(within=20) == {}
