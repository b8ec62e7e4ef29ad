"""Over named hosts by mpirun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ru.doctor import start
from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.target import TARGETS
from tests.doctor.started import clean_environment


def test_hosts_of_words_and_of_a_file(tmp_path):
    assert start.hosts_of("gpu1,gpu2,gpu1") == ["gpu1", "gpu2"]
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# all\ngpu1 slots=8\n\ngpu2\n")
    assert start.hosts_of(str(hostfile)) == ["gpu1", "gpu2"]


@pytest.mark.parametrize("nodes", ["no/such/file", "gpu1,,gpu2", "-x", "a;b"])
def test_what_is_neither_is_told(nodes):
    with pytest.raises(UserError, match="is neither a file nor a list of hosts such as gpu1,gpu2"):
        start.hosts_of(nodes)


def test_empty_file_is_told(tmp_path):
    (tmp_path / "hosts").write_text("# none\n")
    with pytest.raises(UserError, match="names no host"):
        start.hosts_of(str(tmp_path / "hosts"))


def test_job_is_the_renderers():
    job = start.job_over(["gpu1", "gpu2"], Path("/tmp/hosts"), 8, ["--timeout", "30"])
    text = TARGETS["mpirun"].render(job).text
    assert "\nmpirun -np 16 -npernode 8 " in text
    assert "cat /tmp/hosts | ru_with_slots 8" in text
    assert job.command[1:] == ("-m", "megatron_ru", "doctor", "--nodes", "auto", "--timeout", "30")


def test_ssh_gives_up_on_a_dead_host_and_users_options_win():
    made = start.environment({"PATH": "/bin", "OMPI_MCA_plm_rsh_args": "-p 2222"})
    assert made["OMPI_MCA_plm_rsh_args"] == "-p 2222"
    assert "ConnectTimeout=10" in made["PRTE_MCA_plm_ssh_args"]
    assert made["PATH"] == f"/bin:{Path(sys.executable).parent}"


def test_mpirun_that_hangs_is_ended(tmp_path, monkeypatch, capsys):
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/bash\ntouch {tmp_path}/started\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(start, "_whole_seconds", lambda hosts, limit: 3.0)
    assert start.start_over(["localhost"], 1, [], 1.0) == 1
    assert (tmp_path / "started").exists()
    assert "mpirun over localhost did not end within 3 s: try `ssh HOST true`" in capsys.readouterr().err


def test_no_mpirun_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "environment", lambda given: {"PATH": str(tmp_path)})
    with pytest.raises(UserError, match=r"pip install 'megatron-ru\[mpi\]'"):
        start.start_over(["localhost"], 1, [], 1.0)


@pytest.mark.skipif(not (Path(sys.executable).parent / "mpirun").exists(), reason="no Open MPI beside this Python")
def test_a_real_mpirun_on_this_host(tmp_path):
    words = ["--nodes", "localhost", "--gpus-per-node", "2", "--timeout", "60", "--folder", str(tmp_path)]
    program = [sys.executable, "-m", "megatron_ru", "doctor", *words, "--json", "report.json"]
    shown = subprocess.run(program, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert shown.returncode == 0, shown.stderr
    assert "2 of 2 ranks on 1 node" in shown.stdout
    assert "gloo all-reduce of 2 ranks" in shown.stdout
    assert (tmp_path / "report.json").exists()
