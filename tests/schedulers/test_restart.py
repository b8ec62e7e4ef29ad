"""A signal before the time limit, a checkpoint, the queue again, and the losses of a job that nobody disturbed."""

import re
import subprocess

from tests.schedulers.cluster import PROGRAMS, wait_for_lines
from tests.schedulers.faults import losses_in, undisturbed_losses
from tests.schedulers.tiny_model import STEPS


def test_slurm_signals_before_the_time_limit_and_the_requeued_job_has_the_losses_of_an_undisturbed_one(
    slurm, hosts, tmp_path
):
    # Slurm looks at time limits twice a minute, so the limit is lowered once the job trains: it is then the time to
    # signal, and nothing depends on how fast the start was.
    job = slurm.submit("--time", "00:10:00", "--signal", "USR1", "--signal-seconds", "110", "--requeue",
                       gpus=1, command=["python", PROGRAMS / "loop.py", tmp_path, "700"])  # fmt: skip
    wait_for_lines(tmp_path / "losses", 5, lambda: slurm.output(job))
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    slurm.wait(job, "PENDING", seconds=75)
    assert re.search(r"saved step \d+ at a signal", slurm.output(job)), slurm.output(job)
    assert "back into the queue, for time 1 of at most 10" in slurm.output(job)
    saved = len(losses_in(tmp_path))
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    slurm.start_now(job)
    wait_for_lines(tmp_path / "losses", saved + 5, lambda: slurm.output(job))
    slurm.ask("scancel", job)
    slurm.wait(job)
    losses = losses_in(tmp_path)
    assert len(losses) >= saved + 5
    assert losses == undisturbed_losses(2, len(losses))
    assert hosts.left(within=20) == {}


def test_grid_engine_signals_at_the_soft_limit_and_takes_the_job_back_until_it_is_done(grid_engine, hosts, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    # 10 s after each start; 120 steps of 0.1 s do not fit in before it.
    job = grid_engine.submit("--time", "00:05:00", "--signal", "USR1", "--signal-seconds", "290", "--requeue",
                             nodes=1, command=["python", PROGRAMS / "loop.py", folder, "120"])  # fmt: skip
    grid_engine.wait(job, seconds=120)
    output = grid_engine.output(job)
    assert "back into the queue, for time 1 of at most 10" in output, output
    assert re.search(r"saved step \d+ at a signal", output)
    assert grid_engine.exit_code(job) == 0, output
    losses = losses_in(folder)
    assert losses == undisturbed_losses(4, 120)
    assert hosts.left(within=20) == {}


def test_training_on_slurm_that_is_signalled_saves_returns_to_the_queue_and_goes_on(slurm, hosts, tiny_model):
    save = tiny_model.folder / "signalled"
    # Slurm's own signal comes 200 s before the end here; this one is sent by hand, when a step is known to be done.
    job = slurm.submit(
        "--time", "00:10:00", "--signal", "USR1", "--signal-seconds", "200", "--requeue", gpus=1,
        command=tiny_model.command("signalled", "--save", save, "--load", save, "--save-interval", "100"),
    )  # fmt: skip
    wait_for_lines(tiny_model.metrics("signalled"), 2, lambda: slurm.output(job), seconds=120)
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait(job, "PENDING", seconds=60)
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < STEPS
    assert f"saving step {saved} of {STEPS}" in slurm.output(job)
    slurm.start_now(job)
    assert slurm.wait(job, seconds=120) == "COMPLETED", slurm.output(job)[-4000:]
    assert slurm.job(job)["Restarts"] == "1"
    ran = subprocess.CompletedProcess([], 0, slurm.output(job))
    assert tiny_model.run("signalled", ran).losses == tiny_model.undisturbed.losses
    assert hosts.left(within=10) == {}
