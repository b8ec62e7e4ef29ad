import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.slurm_lists import expand_hosts, task_counts


@pytest.mark.parametrize(
    ("written", "hosts"),
    [
        ("login1", ["login1"]),
        ("gpu[003-005,010],login1", ["gpu003", "gpu004", "gpu005", "gpu010", "login1"]),
        ("a,b-2,c.example.org", ["a", "b-2", "c.example.org"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]n[08-09]-ib", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]),
    ],
)
def test_host_lists_expand_as_scontrol_does(written, hosts):
    assert expand_hosts(written) == hosts


@pytest.mark.parametrize("written", ["", "gpu[1-", "gpu[5-3]", "gpu[]", "a,,b", "gpu[1-2", "a,", "gpu]1[", "a b"])
def test_broken_host_list_is_named(written):
    with pytest.raises(UserError, match="is not a Slurm host list such as"):
        expand_hosts(written)


def test_task_counts():
    assert task_counts("4(x2),3") == [4, 4, 3]
    assert task_counts("8") == [8]
    with pytest.raises(UserError, match=r"'4\(x\)' is not a Slurm list of task counts"):
        task_counts("4(x)")
