import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.job_spec import JobSpec
from tests.launch.fake_cluster import FakeCluster, job_fields
from tests.launch.targets.scripts import header, render, start


def test_header_and_start():
    script = render("slurm", nodes=2)
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
        "--dependency=afternotok:7:8", "--signal=USR1@120",
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


def test_torchrun_passes_no_usr1_on():
    with pytest.raises(UserError, match="torchrun ends by USR1 and does not pass it on: say TERM"):
        render("slurm", torchrun=True, signal="USR1", time="1h")
    assert "--signal=TERM@300" in header(render("slurm", torchrun=True, signal="TERM", time="1h"))
