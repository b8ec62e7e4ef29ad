"""`megatron-ru launch mpirun` with Open MPI 4.1 and 5 over the hosts of a file."""

import pytest

from tests.schedulers.cluster import assert_world, launch, ranks_seen, show_rank

NODES = ("h1", "h2")


@pytest.mark.parametrize("where", ["h1", "h0"], ids=["from_the_first_host", "from_a_host_of_no_rank"])
def test_eight_ranks_know_their_place(open_mpi, hosts, hostfile, tmp_path, where):
    record = tmp_path / "ranks"
    ran = launch(hosts, "mpirun", "--nodes", "2", "--gpus-per-node", "4", "--hostfile", hostfile, "--env",
                 "GREETING=здравствуй $HOME", host=where, env=open_mpi, command=show_rank(record))  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert_world(record, hosts, NODES, 4)
    assert {rank["GREETING"] for rank in ranks_seen(record)} == {"здравствуй $HOME"}
    assert hosts.left() == {}


@pytest.fixture
def hostfile(tmp_path):
    """Two hosts, one of them twice and with slots of its own, as people write them."""
    file = tmp_path / "hostfile"
    file.write_text("h1 slots=1\nh2\n\n# h3\nh1\n")
    return file
