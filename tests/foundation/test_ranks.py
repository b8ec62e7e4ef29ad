import os
import re
import socket
import subprocess
import sys

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import (
    apply_rank_environment,
    free_port,
    job_port,
    launched_ranks,
    rank_environment,
)

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MASTER}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
ONE_HOST = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
MVAPICH2 = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
CRAY = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}
# Seven tasks on gpu003 (4) and gpu004 (3); this is the last one.
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_NODELIST": "gpu[001-004]",
}
# What a batch script's own shell sees.
SBATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
}


def numbers(environ):
    found = rank_environment(environ)
    return found.rank, found.world_size, found.local_rank, found.local_world_size, found.source


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        (TORCH, "torch variables"),
        ({**TORCH, "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({**OPEN_MPI, **MASTER}, "Open MPI"),
        ({**MVAPICH2, **MASTER}, "MVAPICH2"),
        ({**HYDRA, **MASTER}, "PMI"),
        ({**CRAY, **MASTER}, "PMI"),
    ],
)
def test_each_source_gives_its_numbers(environ, source):
    assert numbers(environ) == (5, 8, 1, 4, source)
    found = rank_environment(environ)
    assert (found.master_address, found.master_port) == ("10.0.0.1", 12345)


def test_nothing_set_is_one_process_with_a_free_port():
    found = rank_environment({})
    assert numbers({}) == (0, 1, 0, 1, "single process")
    assert found.master_address == "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("", found.master_port))


def test_export_sets_what_is_missing_or_empty_and_nothing_else():
    environ = {**OPEN_MPI, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345", "RANK": "", "OTHER": "x"}
    found = apply_rank_environment(environ)
    assert environ == {**OPEN_MPI, **TORCH, "OTHER": "x"}
    assert apply_rank_environment(environ) == found  # what was exported agrees with the launcher


def test_address_and_port_that_are_set_stay():
    environ = {"MASTER_ADDR": "10.0.0.9"}
    assert apply_rank_environment(environ).master_address == environ["MASTER_ADDR"] == "10.0.0.9"
    assert rank_environment({"MASTER_PORT": "4242"}).master_port == 4242


class TestSlurm:
    def test_srun_task(self):
        assert numbers(SRUN) == (6, 7, 2, 3, "Slurm")
        found = rank_environment(SRUN)
        assert found.master_address == "gpu003"
        assert found.master_port == 10000 + 1234567 % 20000

    def test_step_size_goes_before_that_of_the_allocation(self):
        assert numbers({**SRUN, "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "7"})[1] == 7

    def test_one_host_meets_at_the_loopback(self):
        environ = {**SRUN, "SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_NODEID": "0"}
        environ |= {"SLURM_STEP_TASKS_PER_NODE": "3"}
        assert rank_environment(environ).master_address == "127.0.0.1"

    def test_exported_address_goes_before_the_node_list(self):
        found = rank_environment({**SRUN, "MASTER_ADDR": "10.0.0.9"})
        assert (found.master_address, found.master_port) == ("10.0.0.9", 10000 + 1234567 % 20000)

    @pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
    def test_plain_process_in_a_batch_script_or_salloc_shell_is_alone(self, step):
        assert numbers({**SBATCH, **step}) == (0, 1, 0, 1, "single process")

    def test_mpirun_in_a_batch_script_hides_slurm(self):
        assert numbers({**SBATCH, **OPEN_MPI, **MASTER}) == (5, 8, 1, 4, "Open MPI")

    def test_mpirun_whose_daemon_came_by_srun_hides_slurm(self):
        daemon = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        assert numbers({**daemon, **OPEN_MPI, **MASTER}) == (5, 8, 1, 4, "Open MPI")
        assert numbers({**daemon, **HYDRA, **MASTER}) == (5, 8, 1, 4, "PMI")

    def test_torchrun_with_one_agent_per_node_hides_slurm(self):
        agent = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        assert numbers({**agent, **TORCH, "TORCHELASTIC_RUN_ID": "1"}) == (5, 8, 1, 4, "torchrun")

    def test_other_launcher_with_four_processes_per_task_hides_slurm(self):
        agent = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        assert numbers({**agent, **TORCH}) == (5, 8, 1, 4, "torch variables")
        deepspeed = {name: value for name, value in TORCH.items() if name != "LOCAL_WORLD_SIZE"}
        assert numbers({**agent, **deepspeed, "LOCAL_SIZE": "4"}) == (5, 8, 1, 4, "torch variables")

    def test_same_numbers_on_the_wrong_task_contradict(self):
        agent = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        with pytest.raises(UserError, match="RANK=5 contradicts SLURM_PROCID=0, which Slurm gave"):
            rank_environment({**agent, **TORCH})

    @pytest.mark.parametrize(
        "plugin",
        [{"PMIX_RANK": "6", "PMIX_NAMESPACE": "slurm.pmix.1234567.0"}, {"PMI_RANK": "6", "PMI_SIZE": "7"}],
    )
    def test_mpi_plugins_of_srun_take_sizes_and_address_from_the_step(self, plugin):
        source = "PMIx" if "PMIX_RANK" in plugin else "PMI"
        assert numbers({**SRUN, **plugin}) == (6, 7, 2, 3, source)
        assert rank_environment({**SRUN, **plugin}).master_address == "gpu003"

    def test_pmix_shell_of_salloc_is_alone(self):
        shell = {**SBATCH, "SLURM_STEP_ID": "4294967290", "PMIX_RANK": "0"}
        shell |= {"PMIX_NAMESPACE": "slurm.pmix.77.4294967290"}
        assert numbers(shell) == (0, 1, 0, 1, "single process")


class TestMeetingOnOneHost:
    def test_ranks_of_one_mpirun_agree_and_another_mpirun_differs(self):
        first = rank_environment({**ONE_HOST, "PMIX_NAMESPACE": "prterun-host-10@1"})
        again = rank_environment({**ONE_HOST, "OMPI_COMM_WORLD_RANK": "6", "PMIX_NAMESPACE": "prterun-host-10@1"})
        other = rank_environment({**ONE_HOST, "PMIX_NAMESPACE": "prterun-host-11@1"})
        assert first.master_address == "127.0.0.1"
        assert first.master_port == again.master_port != other.master_port
        assert 10000 <= first.master_port < 30000

    def test_open_mpi_4_and_bare_launchers(self):
        assert rank_environment({**ONE_HOST, "OMPI_MCA_ess_base_jobid": "60007"}).master_port == 10007
        assert rank_environment(ONE_HOST).master_port == job_port(str(os.getppid()))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {**OPEN_MPI, **MASTER, "RANK": "3", "OMPI_COMM_WORLD_RANK": "1"},
            "RANK=3 contradicts OMPI_COMM_WORLD_RANK=1, which Open MPI gave this process: unset RANK, or",
        ),
        ({**HYDRA, **MASTER, "WORLD_SIZE": "4"}, "WORLD_SIZE=4 contradicts PMI_SIZE=8, which PMI gave"),
        ({**SRUN, "LOCAL_RANK": "0"}, "LOCAL_RANK=0 contradicts SLURM_LOCALID=2, which Slurm gave"),
        (
            {**TORCH, "RANK": "8"},
            "RANK=8 is not below WORLD_SIZE=8: ranks count from 0, so set RANK between 0 and 7",
        ),
        ({**TORCH, "LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        (
            {**TORCH, "LOCAL_WORLD_SIZE": "9"},
            "LOCAL_WORLD_SIZE=9 processes on this host are more than WORLD_SIZE=8",
        ),
        (
            {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **MASTER},
            "WORLD_SIZE=0 is no",
        ),
        (
            {**TORCH, "RANK": "five"},
            "RANK='five' is not a whole number from 0 on: set it to one, or unset RANK",
        ),
        ({**TORCH, "RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({**TORCH, "RANK": "1" * 5000}, "is not a whole number"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x' is not a whole number"),
        (
            {"RANK": "0"},
            "RANK=0 without WORLD_SIZE and LOCAL_RANK and LOCAL_WORLD_SIZE does not place this process",
        ),
        ({"RANK": "0"}, "or unset RANK to run alone"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", **MASTER},
            "RANK=1, WORLD_SIZE=2 without LOCAL_RANK and LOCAL_WORLD_SIZE",
        ),
        ({"PMIX_RANK": "2"}, "PMIX_RANK=2 without WORLD_SIZE and LOCAL_RANK and LOCAL_WORLD_SIZE"),
        ({**TORCH, "MASTER_ADDR": ""}, "8 processes need one place to meet, but MASTER_ADDR is not set"),
        (
            OPEN_MPI,
            "8 processes of Open MPI on several hosts need one place to meet, but MASTER_ADDR and MASTER_P",
        ),
        (OPEN_MPI, "pip install mpi4py"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no TCP port: set it between 1 and 65535"),
        ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"}, "'4x2' is not a Slurm list of task counts"),
    ],
)
def test_bad_values_are_one_sentence_that_names_them(environ, message):
    before = dict(environ)
    with pytest.raises(UserError, match=re.escape(message)):
        apply_rank_environment(environ)
    assert environ == before


def test_loopback_address_says_that_all_processes_are_here():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "12345"}
    assert numbers(environ) == (1, 2, 1, 2, "torch variables")


def test_world_of_one_needs_no_rank():
    assert numbers({"WORLD_SIZE": "1"}) == (0, 1, 0, 1, "torch variables")


def test_launcher_is_known_before_an_address_is():
    found = launched_ranks(OPEN_MPI)
    assert (found.launcher, found.rank, found.on_one_host, found.by_srun) == ("Open MPI", 5, False, False)
    assert launched_ranks(SRUN).by_srun


def test_ports_stay_out_of_the_ephemeral_range():
    assert job_port("1234567") == 24567
    assert job_port("1234567") == job_port("1234567")
    assert {10000 <= job_port(job) < 30000 for job in ("0", "19999", "20000", "prterun-host-1@1")} == {True}
    assert 10000 <= free_port() < 30000


def test_import_needs_the_standard_library_alone():
    program = (
        "import sys; before = set(sys.modules); import megatron_ru.foundation.ranks; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "['megatron_ru']"
