"""The bash functions of rendered scripts, run by bash with made-up environments and programs."""

import socket
import subprocess

import pytest

from megatron_ru.foundation.ranks import job_port
from megatron_ru.launch import shell_parts
from megatron_ru.launch.job_spec import JobSpec

IP = """#!/bin/bash
# `ip -4 -o addr show [dev NAME] scope global` of a host with two cards and docker; -4 leaves IPv6 out.
[ "$1 $2 $3 $4" = "-4 -o addr show" ] || exit 1
lines='2: docker0    inet 172.17.0.1/16 brd 172.17.255.255 scope global docker0
3: bond0    inet 10.77.0.10/24 brd 10.77.0.255 scope global bond0
3: bond0    inet 10.77.0.99/24 scope global secondary bond0
4: ib0    inet 10.78.0.10/24 scope global ib0'
if [ "$5" = dev ]; then
    echo "$lines" | grep ": $6 " || { echo "Device $6 does not exist." >&2; exit 1; }
else
    echo "$lines"
fi
"""


def bash(text, folder, **environ):
    environ = {"PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin", **environ}
    shown = subprocess.run(["bash"], input=f"set -euo pipefail\n{text}", env=environ, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def program(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("interfaces", "address"),
    [
        ("bond0", "10.77.0.10"),
        ("ib0 bond0", "10.78.0.10"),
        # The first that is there.
        ("eth7 bond0", "10.77.0.10"),
        # None is: not docker's.
        ("eth7", "10.77.0.10"),
        ("", "10.77.0.10"),
    ],
)
def test_first_address_is_one_ipv4(tmp_path, interfaces, address):
    program(tmp_path, "ip", IP)
    assert bash(f"{shell_parts.FIRST_ADDRESS}ru_first_address {interfaces}", tmp_path) == f"{address}\n"


@pytest.mark.parametrize(
    ("getent", "address"),
    [("echo 127.0.1.1 STREAM me; echo 10.1.2.3 STREAM me; echo 10.1.2.3 DGRAM", "10.1.2.3"),
     ("echo 127.0.1.1 STREAM me", "me.cluster"), ("exit 2", "me.cluster")],
)  # fmt: skip
def test_without_ip_the_name_of_the_host_serves(tmp_path, getent, address):
    program(tmp_path, "ip", "#!/bin/bash\nexit 127\n")
    program(tmp_path, "getent", f"#!/bin/bash\n{getent}\n")
    program(tmp_path, "hostname", "#!/bin/bash\necho me.cluster\n")
    assert bash(f"{shell_parts.FIRST_ADDRESS}ru_first_address bond0", tmp_path) == f"{address}\n"


@pytest.mark.parametrize("job", ["0", "1", "19999", "20000", "54321", "0089", "987654321"])
def test_port_is_that_of_the_ranks_and_never_ephemeral(tmp_path, job):
    """The same formula as in foundation/ranks.py; none of these ports is taken on a test machine, as a rule."""
    port = int(bash(f"{shell_parts.FREE_PORT}ru_free_port {job} 127.0.0.1", tmp_path))
    assert 10000 <= port < 30000
    assert (port - job_port(job)) % 20000 < 5


@pytest.mark.parametrize("job", ["", "[]", "abc", "1" * 40, "12[3].server"])
def test_port_of_whatever_a_scheduler_calls_a_job(tmp_path, job):
    assert 10000 <= int(bash(f"{shell_parts.FREE_PORT}ru_free_port '{job}' 127.0.0.1", tmp_path)) < 30000


def test_a_taken_port_is_left_to_its_owner(tmp_path):
    with socket.socket() as owner:
        for number in range(5000, 5200):
            try:
                owner.bind(("127.0.0.1", 10000 + number))
                break
            except OSError:
                continue
        owner.listen()
        found = int(bash(f"{shell_parts.FREE_PORT}ru_free_port {number} 127.0.0.1", tmp_path))
    assert found != 10000 + number
    assert 0 < found - (10000 + number) < 10


def test_the_port_after_the_last_is_the_first(tmp_path):
    """Somebody listens on 29999, as a stand-in for `timeout` claims."""
    program(tmp_path, "timeout", '#!/bin/bash\n[ "${@: -1}" = 29999 ]\n')
    assert bash(f"{shell_parts.FREE_PORT}ru_free_port 19999 127.0.0.1", tmp_path) == "10000\n"


def test_hundred_taken_ports_are_an_error(tmp_path):
    program(tmp_path, "timeout", "#!/bin/bash\nexit 0\n")
    text = f"{shell_parts.FREE_PORT}ru_free_port 0 h1 && echo found || echo code $?"
    assert bash(text, tmp_path) == "code 1\n"


def test_hosts_come_from_the_first_source_there_is(tmp_path):
    (tmp_path / "list").write_text("h1\nh2\n")
    (tmp_path / "pe").write_text("h3 4 gpu@h3 UNDEFINED\nh4 4 gpu@h4 UNDEFINED\n")
    text = shell_parts.hosts_function(("SGE_JOB_HOSTLIST", "PE_HOSTFILE")) + "ru_hosts"
    both = {"SGE_JOB_HOSTLIST": str(tmp_path / "list"), "PE_HOSTFILE": str(tmp_path / "pe")}
    assert bash(text, tmp_path, **both) == "h1\nh2\n"
    both["SGE_JOB_HOSTLIST"] = str(tmp_path / "gone")
    assert bash(text, tmp_path, **both) == "h3 4 gpu@h3 UNDEFINED\nh4 4 gpu@h4 UNDEFINED\n"
    program(tmp_path, "hostname", "#!/bin/bash\necho me\n")
    assert bash(text, tmp_path) == "me\n"


def test_hosts_of_slurm_are_expanded_by_slurm(tmp_path):
    program(tmp_path, "scontrol", '#!/bin/bash\n[ "$*" = "show hostnames g[1-2]" ] && printf "g1\\ng2\\n"\n')
    text = shell_parts.hosts_function(("SLURM_JOB_NODELIST",)) + "ru_hosts"
    assert bash(text, tmp_path, SLURM_JOB_NODELIST="g[1-2]") == "g1\ng2\n"


@pytest.mark.parametrize(
    ("hosts", "hostfile"),
    [
        ("h1\\nh2\\n", "h1 slots=4\nh2 slots=4\n"),
        # PE_HOSTFILE: slots, queue and processors behind the name.
        ("h3.ci 8 gpu@h3 UNDEFINED\\nh4.ci 8 gpu@h4 UNDEFINED\\n", "h3.ci slots=4\nh4.ci slots=4\n"),
        # PBS_NODEFILE names a host once for each of its processors.
        ("h1\\nh1\\nh2\\nh2\\nh1\\n", "h1 slots=4\nh2 slots=4\n"),
        # A hostfile by hand.
        ("# mine\\n\\n  \\nh2 slots=99\\n", "h2 slots=4\n"),
        # This host first, by whatever length of its name.
        ("h1\\nme.other\\nh2\\n", "me.other slots=4\nh1 slots=4\nh2 slots=4\n"),
        ("h1\\nme\\n", "me slots=4\nh1 slots=4\n"),
        ("", ""),
    ],
)
def test_hostfile_has_slots_and_each_host_once(tmp_path, hosts, hostfile):
    program(tmp_path, "hostname", "#!/bin/bash\necho me.cluster\n")
    assert bash(f"{shell_parts.HOSTFILE}printf '{hosts}' | ru_with_slots 4", tmp_path) == hostfile


def test_too_few_hosts_are_said_before_mpirun_starts(tmp_path):
    program(tmp_path, "mpirun", "#!/bin/bash\necho started\n")
    (tmp_path / "hosts").write_text("h1 slots=8\n")
    job = JobSpec(target="mpirun", command=("true",), nodes=2)
    text = f"ru_hostfile={tmp_path}/hosts\nru_command=(true)\n{shell_parts.mpirun(job, '$$')}"
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/bin"})
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == "this script is made for 2 nodes, and there are 1: h1 slots=8 \n"


def test_modules_are_loaded_one_by_one_and_a_bad_one_ends_the_job(tmp_path):
    """`module load bad good` says that it failed and has loaded good."""
    job = JobSpec(target="slurm", command=("true",), modules=("good/1", "bad/2", "good/3"))
    module = 'module() { echo "$*"; [ "${2%/*}" = good ]; }\n'
    text = module + shell_parts.prologue(job).replace("/etc/profile.d/modules.sh", "/nowhere") + "echo after\n"
    shown = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (1, "load good/1\nload bad/2\n")
    assert shown.stderr == "module bad/2 could not be loaded: see module avail\n"


def test_the_virtual_environment_is_the_one_named(tmp_path):
    folder = tmp_path / "my env's $x"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "activate").write_text("echo activated $unset_here\n")
    job = JobSpec(target="slurm", command=("true",), virtual_environment=str(folder), guard=False)
    assert bash(shell_parts.prologue(job), tmp_path) == "activated\n"


def test_described():
    job = JobSpec(target="slurm", command=("x",), nodes=16, gpus_per_node=4, tensor_parallel=4, pipeline_parallel=8)
    assert shell_parts.described(job) == "16 nodes x 4 GPUs = 64 ranks, TP 4 x PP 8 x DP 2"
    assert shell_parts.described(JobSpec(target="x", command=("x",), gpus_per_node=1)) == "1 node x 1 GPU = 1 rank"
