import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.targets.scripts import render

# Rank 1 fails once rank 0 is done: at the first failure mpirun ends the others, printed or not.
PRINT = (
    'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_PORT $*"; '
    'if [ "$RANK" = 0 ]; then touch "$DONE"; exit 0; fi; until [ -e "$DONE" ]; do sleep 0.1; done; sleep 1; exit 1'
)


def test_the_meeting_place_is_on_the_first_host_of_the_file(tmp_path):
    """mpirun may be started on a host that is none of the ranks'."""
    (tmp_path / "hosts").write_text("node1\nnode2\n")
    for name, text in (
        ("mpirun", 'echo "$MASTER_ADDR"'),
        ("getent", "echo 10.9.8.7 STREAM node1"),
        ("timeout", "exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    text = render("mpirun", nodes=2, hostfile=str(tmp_path / "hosts")).text
    environ = {"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/bin", "RU_PYTHON": sys.executable}
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environ)
    assert (shown.returncode, shown.stdout) == (0, "10.9.8.7\n")


def test_a_missing_hostfile_ends_it(tmp_path):
    text = render("mpirun", nodes=2, hostfile=str(tmp_path / "no hosts")).text
    shown = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env={**os.environ, "RU_PYTHON": sys.executable}
    )
    assert shown.returncode != 0
    assert "no hosts" in shown.stderr


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "mpirun").exists() and shutil.which("mpirun") is None, reason="no Open MPI here"
)
def test_two_ranks_of_a_real_mpirun(tmp_path):
    text = render("mpirun", gpus_per_node=2, command=("bash", "-c", PRINT, "-", "a b", "$(c)")).text
    environ = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "DONE": str(tmp_path / "done"),
    }  # fmt: skip
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environ)
    assert shown.returncode == 1, shown.stderr
    lines = sorted(line.split(maxsplit=5) for line in shown.stdout.splitlines())
    assert [(*line[:4], line[5]) for line in lines] == [
        ("0", "0", "2", "2", "a b $(c)"),
        ("1", "1", "2", "2", "a b $(c)"),
    ]
    assert lines[0][4] == lines[1][4]
