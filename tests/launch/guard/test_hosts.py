import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.guard.hosts import Hosts


def test_the_hostfile_holds_as_many_as_are_needed(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("n0 slots=4\n\nn1.ci slots=4\nn2 slots=4\nn3 slots=4\n")
    hosts = Hosts(["mpirun", "-hostfile", str(file)], 2, str(file))
    assert hosts.words_without(()) == ["mpirun", "-hostfile", str(file)]
    assert file.read_text() == "n0 slots=4\nn1.ci slots=4\n"
    hosts.words_without(("n1",))
    assert file.read_text() == "n0 slots=4\nn2 slots=4\n"
    hosts.words_without(("n1", "n2"))
    assert file.read_text() == "n0 slots=4\nn3 slots=4\n"


def test_srun_leaves_them_out_itself():
    hosts = Hosts(["/usr/bin/srun", "--nodes=2", "x"], 1, None)
    assert hosts.words_without(()) == ["/usr/bin/srun", "--nodes=2", "x"]
    assert hosts.words_without(("n1",)) == ["/usr/bin/srun", "--exclude=n1", "--nodes=2", "x"]


def test_without_spare_hosts_nothing_changes(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("n0\nn1\n")
    assert Hosts(["mpirun"], 0, str(file)).words_without(("n1",)) == ["mpirun"]
    assert file.read_text() == "n0\nn1\n"


def test_too_few_hosts(tmp_path):
    (tmp_path / "hosts").write_text("n0\n")
    with pytest.raises(UserError, match="lists 1 hosts, of which 1 are spare"):
        Hosts(["mpirun"], 1, str(tmp_path / "hosts"))
