"""`megatron-ru launch torchrun` on two hosts, started by hand on each."""

import subprocess

from tests.schedulers.cluster import assert_world, launch_words, ranks_seen, show_rank


def test_eight_ranks_know_their_place(hosts, tmp_path):
    record = tmp_path / "ranks"
    words = launch_words("torchrun", "--nodes", "2", "--gpus-per-node", "4", "--env", "GREETING=здравствуй $HOME",
                         command=show_rank(record))  # fmt: skip
    started = [
        hosts.start(name, words, env={"NODE": str(node), "MASTER": hosts.address("h1"), "PORT": "29123"},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node, name in enumerate(("h1", "h2"))
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert_world(record, hosts, ("h1", "h2"), 4)
    assert {rank["GREETING"] for rank in ranks_seen(record)} == {"здравствуй $HOME"}
    assert hosts.left() == {}
