"""The guard around srun, the mpirun of Grid Engine and several torchruns: a fault, another attempt, the same losses.

`test_faults` has every fault under mpirun; here is one for each of the other launchers, the tiny model included.
"""

import subprocess

import pytest

from tests.schedulers.cluster import PROGRAMS, launch, launch_words
from tests.schedulers.faults import STEPS, losses_in, undisturbed_losses

LIMITS = ("--stall", "6", "--grace", "2", "--retries", "2")


def loop(folder, fault, rank=3):
    folder.mkdir(exist_ok=True)
    return ["python", PROGRAMS / "loop.py", folder, str(STEPS), fault, str(rank), "12"]


def test_srun(slurm, hosts, tmp_path):
    job = slurm.submit("--time", "00:05:00", *LIMITS, gpus=2, command=loop(tmp_path / "job", "hang"))
    assert slurm.wait(job) == "COMPLETED", slurm.output(job)
    assert "rank 3 on h2 after step 11: hangs" in slurm.output(job)
    assert losses_in(tmp_path / "job") == undisturbed_losses(4, STEPS)
    assert hosts.left(within=5) == {}


def test_srun_with_a_torchrun_for_each_node(slurm, hosts, tmp_path):
    job = slurm.submit("--time", "00:05:00", "--torchrun", *LIMITS, gpus=2, command=loop(tmp_path / "job", "exit:7"))
    assert slurm.wait(job) == "COMPLETED", slurm.output(job)
    assert "rank 3 on h2 after step 11: exited with code 7" in slurm.output(job)
    assert losses_in(tmp_path / "job") == undisturbed_losses(4, STEPS)
    assert hosts.left(within=5) == {}


def test_grid_engine(grid_engine, hosts, tmp_path):
    job = grid_engine.submit("--env", "OMP_NUM_THREADS=1", *LIMITS, nodes=1, command=loop(tmp_path / "job", "stop"))
    grid_engine.wait(job)
    output = grid_engine.output(job)
    assert grid_engine.exit_code(job) == 0, output
    assert "after step 11: is stopped" in output
    assert losses_in(tmp_path / "job") == undisturbed_losses(4, STEPS)
    assert hosts.left(within=5) == {}


def test_torchrun_on_each_host(hosts, tmp_path):
    words = launch_words("torchrun", "--nodes", "2", "--gpus-per-node", "2", *LIMITS,
                         command=loop(tmp_path / "job", "hang"))  # fmt: skip
    environment = {"MASTER": hosts.address("h1"), "PORT": "29125"}
    started = [
        hosts.start(name, words, env={**environment, "NODE": str(node)},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node, name in enumerate(("h1", "h2"))
    ]  # fmt: skip
    said = [process.communicate(timeout=90)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "rank 3 on h2 after step 11: hangs" in said[0], said
    assert losses_in(tmp_path / "job") == undisturbed_losses(4, STEPS)
    assert hosts.left(within=5) == {}


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_tiny_model_finishes_with_the_losses_of_an_undisturbed_run(hosts, tiny_model, tmp_path, fault):
    name = f"guarded_{fault}"
    save = tiny_model.folder / name
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("h1\nh2\n")
    ran = launch(
        hosts, "mpirun", "--nodes", "2", "--gpus-per-node", "1", "--hostfile", hostfile, "--stall", "10",
        "--grace", "2", "--retries", "1", "--env", f"MEGATRON_RU_FAULT={fault},rank=1,step=4", host="h1", timeout=200,
        command=tiny_model.command(name, "--save", save, "--load", save, "--save-interval", "2"),
    )  # fmt: skip
    blamed = "was killed by SIGKILL" if fault == "kill" else "hangs without a beat"
    assert f"rank 1 on h2 after step 3: {blamed}" in ran.stdout, ran.stdout[-6000:]
    assert tiny_model.run(name, ran).losses == tiny_model.undisturbed.losses
    assert hosts.left(within=5) == {}
