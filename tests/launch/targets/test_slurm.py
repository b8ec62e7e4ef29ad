import subprocess

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.job_spec import JobSpec
from tests.launch.fake_cluster import FakeCluster, job_fields
from tests.launch.targets.scripts import header, render, requeue_lines, start


def test_header_and_start():
    script = render("slurm", nodes=2, guard=False)
    assert header(script) == [
        "--job-name=megatron-ru", "--nodes=2", "--ntasks-per-node=8", "--gres=gpu:8", "--output=./slurm-%j.out",
        "--no-requeue",
    ]  # fmt: skip
    assert start(script) == (
        "# A rank that fails takes the others with it instead of leaving them waiting.\n"
        "export RU_LOCAL_SIZE=8\n"
        "srun --kill-on-bad-exit=1 \\\n"
        '    bash -c \'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" '
        'LOCAL_WORLD_SIZE="$RU_LOCAL_SIZE"; exec "$@"\' rank \\\n'
        '    "${ru_command[@]}"\n'
    )
    assert script.submit == ("sbatch", "--parsable")
    assert script.check == ("sbatch", "--test-only")


def test_everything_else_that_slurm_takes():
    script = render(
        "slurm", gpus_per_node=4, time="32:00:00", group="acc", queue="gpu", cpus_per_task=6, output="logs/",
        array="0-9:3%2", dependency="afternotok:7:8", requeue=True, signal="USR1", signal_seconds=120,
        container="nvcr.io#nvidia/pytorch:25.06-py3", mounts=("/a b:/a", "/c:/c:ro"),
    )  # fmt: skip
    assert header(script)[2:] == [
        "--ntasks-per-node=4", "--gres=gpu:4", "--output=logs/slurm-%A_%a.out", "--requeue", "--open-mode=append",
        "--cpus-per-task=6", "--time=1-08:00:00", "--account=acc", "--partition=gpu", "--array=0-9:3%2",
        "--dependency=afternotok:7:8", "--signal=B:USR1@120",
    ]  # fmt: skip
    assert (
        "srun --kill-on-bad-exit=1 --cpus-per-task=6 \\\n"
        "    '--container-image=nvcr.io#nvidia/pytorch:25.06-py3' '--container-mounts=/a b:/a,/c:/c:ro' \\\n"
    ) in script.text
    assert '\nexport RU_ARRAY_INDEX="$SLURM_ARRAY_TASK_ID"\n' in script.text


def test_torchrun_for_each_node(tmp_path):
    cluster = FakeCluster(tmp_path)
    job = {**job_fields("slurm", tmp_path), "command": cluster.command("a b", "--x", "$(y)")}
    script = render(**job, torchrun=True, cpus_per_task=6)
    # All cores of a node are one task's then.
    assert {"--ntasks-per-node=1", "--gres=gpu:4", "--cpus-per-task=24"} <= set(header(script))
    seen = cluster.run(script, JobSpec(**job, torchrun=True))
    assert [one["environ"]["RANK"] for one in seen] == [str(rank) for rank in range(8)]
    assert [one["environ"]["LOCAL_RANK"] for one in seen] == list("01230123")
    assert {one["environ"]["WORLD_SIZE"] for one in seen} == {"8"}
    assert len({(one["environ"]["MASTER_ADDR"], one["environ"]["MASTER_PORT"]) for one in seen}) == 1
    assert 24321 <= int(seen[0]["environ"]["MASTER_PORT"]) < 24330
    assert {tuple(one["words"]) for one in seen} == {("a b", "--x", "$(y)")}


def test_torchrun_passes_no_usr1_on_and_a_guard_does():
    job = {"torchrun": True, "time": "1h"}
    with pytest.raises(UserError, match="torchrun ends by USR1 and does not pass it on: say TERM, or leave --no-guard"):
        render("slurm", **job, signal="USR1", guard=False)
    assert "--signal=TERM@300" in header(render("slurm", **job, signal="TERM", guard=False))
    # To the script alone, whose guard tells the ranks.
    assert "--signal=B:USR1@300" in header(render("slurm", **job, signal="USR1"))


def test_spare_nodes_are_asked_for_and_not_used():
    script = render("slurm", nodes=2, gpus_per_node=4, spares=1, retries=3)
    assert "--nodes=3" in header(script)
    assert "--retries 3 --spares 1 -- \\\n    srun --kill-on-bad-exit=1 --nodes=2 --ntasks=8 \\\n" in script.text
    assert "# Slurm: 2 nodes (1 spare) x 4 GPUs = 8 ranks." in script.text
    script = render("slurm", nodes=2, gpus_per_node=4, spares=1, retries=3, torchrun=True)
    assert "srun --kill-on-bad-exit=1 --ntasks-per-node=1 --nodes=2 --ntasks=2 \\\n" in script.text


def test_slurm_takes_a_job_back_as_often_as_it_was_told(tmp_path):
    text = requeue_lines(render("slurm", requeue=True).text, "set -euo pipefail\nru_code=$CODE\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$*"\n')
    (tmp_path / "scontrol").chmod(0o755)

    def run(code, **environ):
        environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": code, "SLURM_JOB_ID": "12", **environ}
        ended = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True)
        return ended.returncode, ended.stdout

    assert run("75") == (75, "requeue 12\n")
    assert run("75", SLURM_RESTART_COUNT="9") == (75, "requeue 12\n")
    assert run("75", SLURM_RESTART_COUNT="10") == (75, "")
    assert run("3") == (3, "")


@pytest.mark.parametrize("known", [True, False])
def test_the_keeper_runs_inside_the_image_where_the_image_has_it(tmp_path, known):
    """What srun starts, with a stand-in for the image's python3."""
    text = render("slurm", container="image", gpus_per_node=1).text
    words = text[text.index("bash -c 'if python3") :].partition("\\\n")[0]
    (tmp_path / "python3").write_text(f'#!/bin/bash\necho "python3 $*"\nexit {0 if known else 1}\n')
    (tmp_path / "python3").chmod(0o755)
    program = f"{words} echo 'a b'"
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RANK": "0"}
    ended = subprocess.run(["bash", "-c", program], env=environ, capture_output=True, text=True)
    if known:
        assert (ended.stdout, ended.stderr) == ("python3 -m megatron_ru keep -- echo a b\n", "")
    else:
        assert ended.stdout == "a b\n"
        assert ended.stderr.startswith("python3 of the image cannot import megatron_ru, so hangs go unnoticed")
        silent = subprocess.run(["bash", "-c", program], env={**environ, "RANK": "1"}, capture_output=True, text=True)
        assert (silent.stdout, silent.stderr) == ("a b\n", "")
