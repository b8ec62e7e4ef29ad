import os
import sys
from pathlib import Path

import pytest

from megatron_ru.experiments import launcher
from megatron_ru.experiments.launcher import child_environment, find_launcher

SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo "{version}"; exit 0; fi
{body}
"""


@pytest.fixture
def mpirun(tmp_path, monkeypatch):
    """A function that puts an `mpirun` of one's own on an otherwise empty PATH and returns that environment."""
    # The one beside this Python must not be found.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python"))

    def make(version="mpirun (Open MPI) 4.1.6", body="echo 2; echo 2"):
        path = tmp_path / "mpirun"
        path.write_text(SCRIPT.format(version=version, body=body))
        path.chmod(0o755)
        return {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    return make


def test_torchrun_where_there_is_no_mpirun(mpirun, tmp_path):
    found = find_launcher(4, {"PATH": str(tmp_path)})
    assert (found.name, found.reason) == ("torchrun", "there is no mpirun")
    assert found.words[1:] == ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")


def test_open_mpi_may_have_more_ranks_than_cores(mpirun, tmp_path, monkeypatch):
    environ = mpirun()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = find_launcher(4, environ)
    path = str(tmp_path / "mpirun")
    assert found.words == (path, "--oversubscribe", "--bind-to", "none", "-np", "4", sys.executable)
    assert (found.name, found.reason) == ("mpirun", path)


def test_root_is_allowed(mpirun, monkeypatch):
    environ = mpirun()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_launcher(4, environ).words[1] == "--allow-run-as-root"


def test_other_mpis_know_none_of_these_options(mpirun):
    found = find_launcher(4, mpirun(version="HYDRA build details"))
    assert found.words[1:3] == ("-np", "4")


def test_torchrun_where_the_processes_do_not_see_each_other(mpirun, tmp_path):
    found = find_launcher(4, mpirun(body="echo 1; echo 1"))
    assert found.name == "torchrun"
    assert found.reason == (
        f"{tmp_path / 'mpirun'} does not work: mpi4py is of another MPI, its processes do not see each other"
    )


def test_torchrun_where_mpirun_fails(mpirun, tmp_path):
    found = find_launcher(4, mpirun(body="echo '-----' >&2; echo 'no slots' >&2; exit 3"))
    assert (found.name, found.reason) == (
        "torchrun", f"{tmp_path / 'mpirun'} does not work: exit code 3, no slots",
    )  # fmt: skip


def test_torchrun_where_mpi4py_is_missing(mpirun, monkeypatch):
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    found = find_launcher(4, mpirun())
    assert (found.name, found.reason) == ("torchrun", "there is an mpirun, but no mpi4py")


def test_the_mpirun_beside_python_comes_first(mpirun, tmp_path):
    environ = mpirun()
    beside = Path(sys.executable).parent / "mpirun"
    beside.parent.mkdir()
    beside.write_text((tmp_path / "mpirun").read_text())
    beside.chmod(0o755)
    assert find_launcher(4, environ).words[0] == str(beside)


def test_children_inherit_no_rank():
    given = {"RANK": "3", "MASTER_PORT": "1", "MEGATRON_RU": "1", "HOME": "/h", "OMP_NUM_THREADS": "8"}
    found = child_environment(given)
    assert found == {"HOME": "/h", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
