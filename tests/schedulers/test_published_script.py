"""The four bugs of the job script that ABCI's users copied for years, each where it bit, and ours beside it.

The published lines: `MASTER_ADDR=$(ip addr show bond0 | grep inet | …)`, `MASTER_PORT=$((10000 + ($JOB_ID % 50000)))`,
`mpirun -np N -npernode G --hostfile $SGE_JOB_HOSTLIST` without slots, and no `-x`.
"""

from pathlib import Path

import pytest

from tests.schedulers.cluster import launch, ranks_seen, show_rank

NODES = ("h1", "h2")


@pytest.fixture
def two_hosts(tmp_path):
    """As SGE_JOB_HOSTLIST has them: a name to a line."""
    file = tmp_path / "hostlist"
    file.write_text("h1\nh2\n")
    return file


def test_address_is_one_ipv4_address_where_grep_inet_finds_two(hosts, tmp_path):
    published = "ip addr show bond0 | grep inet | cut -d ' ' -f 6 | cut -d/ -f 1"
    found = hosts.run("h1", ["bash", "-c", published]).stdout.split()
    assert found[0] == hosts.address("h1")
    assert len(found) == 2, "bond0 has an IPv6 address too, or the trap is not set"
    assert ":" in found[1]
    record = tmp_path / "ranks"
    ran = launch(hosts, "mpirun", "--gpus-per-node", "1", host="h1", command=show_rank(record))
    assert ran.returncode == 0, ran.stdout
    assert ranks_seen(record)[0]["MASTER_ADDR"] == hosts.address("h1")


def test_remote_ranks_know_the_meeting_place_where_mpirun_without_x_tells_them_nothing(
    open_mpi, hosts, two_hosts, tmp_path
):
    published = tmp_path / "published"
    slots = tmp_path / "slots"
    slots.write_text("h1 slots=1\nh2 slots=1\n")
    hosts.run(
        "h1", ["mpirun", "-np", "2", "-hostfile", slots, *show_rank(published)],
        env={**open_mpi, "MASTER_ADDR": hosts.address("h1"), "RANK": "0"},
    )  # fmt: skip
    addresses = {rank["host"]: rank["MASTER_ADDR"] for rank in ranks_seen(published, by_rank=False)}
    assert addresses == {"h1": hosts.address("h1"), "h2": None}
    record = tmp_path / "ranks"
    ran = launch(hosts, "mpirun", "--nodes", "2", "--gpus-per-node", "1", "--hostfile", two_hosts, host="h1",
                 env=open_mpi, command=show_rank(record))  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert {rank["host"]: rank["MASTER_ADDR"] for rank in ranks_seen(record)} == dict.fromkeys(
        NODES, hosts.address("h1")
    )


def test_each_host_has_slots_where_a_hostfile_without_them_is_refused(open_mpi, hosts, two_hosts, tmp_path):
    published = hosts.run("h1", ["mpirun", "-np", "8", "-npernode", "4", "-hostfile", two_hosts, "true"], env=open_mpi)
    assert published.returncode != 0
    assert "slots" in published.stdout
    record = tmp_path / "ranks"
    ran = launch(hosts, "mpirun", "--nodes", "2", "--gpus-per-node", "4", "--hostfile", two_hosts, host="h1",
                 env=open_mpi, command=show_rank(record))  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert [rank["host"] for rank in ranks_seen(record)] == ["h1"] * 4 + ["h2"] * 4


def test_port_of_a_job_lies_below_those_of_outgoing_connections(grid_engine, tmp_path):
    record = tmp_path / "ranks"
    job = grid_engine.submit(nodes=1, command=show_rank(record))
    grid_engine.wait(job)
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert first <= 10000 + int(job) % 50000 <= last, "job numbers of this cluster are those where the formula fails"
    port = int(ranks_seen(record)[0]["MASTER_PORT"])
    assert port == 10000 + int(job) % 20000 < first
