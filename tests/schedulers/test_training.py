"""A tiny model trains through every launcher over two hosts with the losses of one process."""

import subprocess

import pytest

from tests.schedulers.cluster import launch, launch_words
from tests.training_runs import relative_difference

STEPS = 4


@pytest.fixture(scope="module")
def alone(tiny_model, all_hosts):
    """Four steps of one process, started by `launch local` on the login host."""
    words = tiny_model.command("alone", layout=(), steps=STEPS)
    run = tiny_model.run("alone", launch(all_hosts, "local", "--gpus-per-node", "1", command=words), STEPS)
    assert run.losses[STEPS] < run.losses[1] - 0.5, "the model must learn, or equal losses prove nothing"
    return run


def trained(tiny_model, name, start, *layout):
    """What the run that `start` makes of the command leaves behind."""
    words = tiny_model.command(name, *layout, steps=STEPS)
    return tiny_model.run(name, start(words), STEPS)


@pytest.mark.parametrize("options", [(), ("--torchrun",)], ids=["srun", "torchrun"])
def test_slurm(slurm, hosts, tiny_model, alone, options):
    def start(words):
        job = slurm.submit("--time", "00:05:00", *options, nodes=2, gpus=1, command=words)
        state = slurm.wait(job, seconds=180)
        return subprocess.CompletedProcess(words, int(state != "COMPLETED"), slurm.output(job))

    run = trained(tiny_model, f"slurm{len(options)}", start)
    assert relative_difference(alone, run) < 1e-4
    assert hosts.left(within=5) == {}


def test_grid_engine(grid_engine, hosts, tiny_model, alone):
    def start(words):
        job = grid_engine.submit("--env", "OMP_NUM_THREADS=1", nodes=1, command=words)
        grid_engine.wait(job, seconds=180)
        return subprocess.CompletedProcess(words, grid_engine.exit_code(job), grid_engine.output(job))

    run = trained(tiny_model, "grid_engine", start, "--pipeline-model-parallel-size", "2")
    assert relative_difference(alone, run) < 1e-4
    assert hosts.left(within=5) == {}


def test_mpirun(open_mpi, hosts, tiny_model, alone, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("h1\nh2\n")
    environment = {**open_mpi, "PATH": f"{hosts.folder}/environment/bin:{open_mpi['PATH']}"}

    def start(words):
        return launch(hosts, "mpirun", "--nodes", "2", "--gpus-per-node", "1", "--hostfile", hostfile, host="h1",
                      env=environment, command=words, timeout=180)  # fmt: skip

    run = trained(tiny_model, f"mpirun{open_mpi['PATH'].count(':')}", start)
    assert relative_difference(alone, run) < 1e-4
    assert hosts.left(within=5) == {}


def test_torchrun(hosts, tiny_model, alone):
    def start(command):
        words = launch_words("torchrun", "--nodes", "2", "--gpus-per-node", "1", command=command)
        environment = {"MASTER": hosts.address("h1"), "PORT": "29124"}
        started = [
            hosts.start(name, words, env={**environment, "NODE": str(node)},
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for node, name in enumerate(("h1", "h2"))
        ]  # fmt: skip
        said = "".join(process.communicate(timeout=180)[0] for process in started)
        return subprocess.CompletedProcess(words, max(process.wait() for process in started), said)

    run = trained(tiny_model, "torchrun", start)
    assert relative_difference(alone, run) < 1e-4
    assert hosts.left(within=5) == {}
