"""`megatron-ru launch abci-v` on a real Grid Engine with ABCI's resource types."""

import re

import pytest

from tests.schedulers.cluster import assert_world, ranks_seen, show_rank, wait_for_lines
from tests.schedulers.grid_engine_cluster import NODES


@pytest.mark.parametrize(("target", "per_host"), [("abci-v", 4), ("abci-a", 8)])
def test_ranks_know_their_place(grid_engine, hosts, tmp_path, target, per_host):
    record = tmp_path / "ranks"
    job = grid_engine.submit("--env", "GREETING=здравствуй $HOME", target=target, command=show_rank(record))
    grid_engine.wait(job)
    assert grid_engine.exit_code(job) == 0, grid_engine.output(job)
    assert_world(record, hosts, NODES, per_host)
    assert {rank["GREETING"] for rank in ranks_seen(record)} == {"здравствуй $HOME"}
    assert hosts.left(within=5) == {}


def test_array_gives_each_job_its_number_and_port(grid_engine, tmp_path):
    record = tmp_path / "ranks"
    job = grid_engine.submit("--array", "2-4:2", nodes=1, command=show_rank(record))
    grid_engine.wait(job)
    seen = ranks_seen(record)
    assert sorted((rank["RU_ARRAY_INDEX"], rank["RANK"]) for rank in seen) == [
        (index, rank) for index in "24" for rank in "0123"
    ], grid_engine.output(job)
    assert len({(rank["RU_ARRAY_INDEX"], rank["MASTER_PORT"]) for rank in seen}) == 2, "the ranks of a job agree"
    assert len({rank["MASTER_PORT"] for rank in seen}) == 2, "jobs that may share a host do not share a port"
    assert sorted(run["exit_status"].split()[0] for run in grid_engine.accounting(job)) == ["0", "0"]


def test_dependent_job_starts_after_the_first_has_ended(grid_engine, tmp_path):
    record = tmp_path / "ranks"
    first = grid_engine.submit(nodes=1, command=show_rank(record, "sleep", "1"))
    second = grid_engine.submit("--dependency", f"afterany:{first}", nodes=1, command=show_rank(record, "second"))
    assert grid_engine.state(second) == "hqw"
    grid_engine.wait(second)
    words = [rank["words"] for rank in ranks_seen(record, by_rank=False)]
    assert words == [["sleep", "1"]] * 4 + [["second"]] * 4


def test_check_says_what_grid_engine_thinks_and_starts_nothing(grid_engine, tmp_path):
    record = tmp_path / "ranks"
    good = grid_engine.launch(action="--check", command=show_rank(record))
    assert (good.returncode, "found suitable queue(s)" in good.stdout) == (0, True), good.stdout
    bad = grid_engine.launch(action="--check", nodes=3, command=show_rank(record))
    assert bad.returncode != 0
    assert "no suitable queues" in bad.stdout, bad.stdout
    assert not record.exists()
    assert grid_engine.ask("qstat", "-u", "*") == ""


def test_submission_that_grid_engine_refuses_prints_no_id(grid_engine, tmp_path):
    sent = grid_engine.launch("--dependency", "afterany:1", "--group", "unknown", command=show_rank(tmp_path / "ranks"))
    assert sent.returncode != 0
    assert 'the requested project "unknown" does not exist' in sent.stdout, sent.stdout
    assert not re.search(r"(?m)^\d+$", sent.stdout)


def test_qdel_leaves_no_process_behind(grid_engine, hosts, tmp_path):
    record = tmp_path / "ranks"
    job = grid_engine.submit(command=show_rank(record, "sleep", "600"))
    wait_for_lines(record, 8, lambda: grid_engine.output(job))
    assert set(hosts.left()) == set(NODES)
    grid_engine.ask("qdel", job)
    grid_engine.wait(job)
    assert hosts.left(within=20) == {}


def test_exit_code_of_a_rank_is_that_of_the_job(grid_engine, hosts):
    program = 'if [ "$RANK" = 5 ]; then sleep 1; exit 7; fi; exec sleep 600'
    job = grid_engine.submit(command=["bash", "-c", program])
    grid_engine.wait(job)
    assert grid_engine.exit_code(job) == 7, grid_engine.output(job)
    assert hosts.left(within=20) == {}


def test_site_refuses_what_abci_refuses(grid_engine):
    """A job without a time limit, without a group, or for two shared GPUs: the verifier of these tests is no rubber
    stamp, so what it accepts means something."""
    for words, reason in (
        (["-g", "gaa50000", "-l", "rt_F=1"], "no h_rt"),
        (["-l", "rt_F=1", "-l", "h_rt=0:1:0"], "no group"),
        (["-g", "gaa50000", "-l", "rt_G.small=2", "-l", "h_rt=0:1:0"], "one at most"),
        (["-g", "gaa50000", "-l", "h_rt=0:1:0"], "no resource type"),
    ):
        refused = grid_engine.hosts.run(
            "h0", ["qsub", *words, "-b", "y", "true"], env=grid_engine.environment, folder=grid_engine.folder
        )
        assert refused.returncode != 0
        assert reason in refused.stdout
    job = grid_engine.ask(
        "qsub", "-g", "gaa50000", "-l", "rt_G.small=1", "-l", "h_rt=0:1:0", "-terse", "-o", "/dev/null", "-j", "y",
        "-b", "y", "true",
    ).strip()  # fmt: skip
    grid_engine.wait(job)
    assert grid_engine.exit_code(job) == 0
