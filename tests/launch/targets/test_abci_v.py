import subprocess

import pytest

from megatron_ru.foundation.errors import UserError
from tests.launch.fake_cluster import FakeCluster, job_fields
from tests.launch.targets.scripts import header, render, requeue_lines, start

JOB = {"gpus_per_node": 4, "nodes": 2, "time": "1-08:00:00", "group": "gaa50000"}


def test_header_and_start():
    script = render("abci-v", **JOB, guard=False)
    assert header(script) == [
        "-cwd", "-N megatron-ru", "-l rt_F=2", "-l h_rt=32:00:00", "-j y", "-o ./", "-r n",
    ]  # fmt: skip
    assert start(script) == (
        "# With the keepalive options mpirun ends when a host is gone, instead of waiting for ever.\n"
        "mpirun -np 8 -npernode 4 \\\n"
        '    -hostfile "$ru_hostfile" --bind-to none \\\n'
        "    -mca oob_tcp_keepalive_time 5 -mca oob_tcp_keepalive_intvl 2 -mca oob_tcp_keepalive_probes 3 \\\n"
        '    "${ru_travels[@]}" \\\n'
        '    bash -c \'export RANK="$OMPI_COMM_WORLD_RANK" WORLD_SIZE="$OMPI_COMM_WORLD_SIZE" '
        'LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK" LOCAL_WORLD_SIZE="$OMPI_COMM_WORLD_LOCAL_SIZE"; exec "$@"\' rank \\\n'
        '    "${ru_command[@]}"\n'
    )
    assert script.submit == ("qsub", "-g", "gaa50000", "-terse")
    assert script.check == ("qsub", "-g", "gaa50000", "-w", "v")
    assert (
        '\nMASTER_ADDR=$(ru_first_address bond0)\nMASTER_PORT=$(ru_free_port "$JOB_ID" "$MASTER_ADDR")\n' in script.text
    )


def test_everything_else_that_grid_engine_takes():
    script = render(
        "abci-v", **JOB, name="ru.7b-3", output="logs/", array="2-8:2%3", dependency="afterany:12:13", requeue=True,
        signal="USR1", signal_seconds=90, interfaces=("ib0", "eth0"), container="image.sif", mounts=("/a b:/a:ro",),
    )  # fmt: skip
    assert header(script) == [
        "-cwd", "-N ru.7b-3", "-l rt_F=2", "-l h_rt=32:00:00", "-j y", "-o logs/", "-r y", "-l s_rt=31:58:30",
        "-t 2-8:2", "-tc 3", "-hold_jid 12,13",
    ]  # fmt: skip
    # The keeper is outside of the container.
    inside = "singularity exec --nv --bind '/a b:/a:ro' image.sif \"${ru_command[@]}\" <&0 &\n"
    assert f'    "$ru_python" -m megatron_ru keep -- {inside}' in script.text
    assert "MASTER_ADDR=$(ru_first_address ib0 eth0)\n" in script.text
    assert 'ru_free_port "$((JOB_ID + SGE_TASK_ID))"' in script.text


def test_tasks_of_an_array_have_an_index_and_ports_of_their_own(tmp_path):
    cluster = FakeCluster(tmp_path)
    job = {**job_fields("abci-v", tmp_path), "command": cluster.command()}
    from megatron_ru.launch.job_spec import JobSpec

    spec = JobSpec(**job, array="1-4")
    seen = cluster.run(render(**job, array="1-4"), spec)
    assert {one["all"]["RU_ARRAY_INDEX"] for one in seen} == {"3"}
    # 54321 + 3 mod 20000, or a little more where that is taken.
    assert 24324 <= int(seen[0]["environ"]["MASTER_PORT"]) < 24330


def test_the_soft_limit_leaves_the_shell_alive():
    """bash ends by a USR1 that it does not expect, and mpirun would be killed with the job."""
    text = render("abci-v", **JOB, signal="USR1").text
    trap = text[text.index("trap : USR1") :].splitlines()[0]
    shown = subprocess.run(["bash", "-c", f"{trap}\nkill -USR1 $$\necho alive"], capture_output=True, text=True)
    assert shown.stdout == "alive\n"


def test_grid_engine_takes_a_job_back_at_99_as_often_as_it_was_told(tmp_path):
    text = render("abci-v", **JOB, requeue=True, retries=2, name="n-1").text
    (tmp_path / "job").write_text(requeue_lines(text, "set -euo pipefail\nru_code=$CODE\n"))

    def run(code, task="undefined"):
        environ = {"PATH": "/usr/bin:/bin", "CODE": code, "JOB_ID": "5", "SGE_TASK_ID": task}
        return subprocess.run(["bash", "job"], cwd=tmp_path, env=environ, capture_output=True).returncode

    assert [run("75"), run("75"), run("75", "2"), run("75")] == [99, 99, 99, 75]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".n-1.requeues.5.2", "job"]
    # Counted anew, and of no use once the job is done.
    assert [run("75"), run("7"), run("75"), run("0")] == [99, 7, 99, 0]
    assert not (tmp_path / ".n-1.requeues.5.undefined").exists()
    # A rank's own 99 and 100 mean something else to Grid Engine.
    assert [run("99"), run("100")] == [1, 1]


def test_without_requeue_75_is_passed_on(tmp_path):
    text = requeue_lines(render("abci-v", **JOB).text, "ru_code=75\n")
    assert subprocess.run(["bash", "-c", text], env={"PATH": "/usr/bin:/bin", "JOB_ID": "5"}).returncode == 75


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dependency": "afterok:5"}, "however it ended, and cannot do afterok: say afterany:5"),
        ({"dependency": "singleton"}, "cannot do singleton: say afterany:JOB"),
        ({"array": "0-4"}, "array '0-4' begins at 0, and Grid Engine counts from 1"),
        ({"signal": "TERM"}, "Grid Engine sends USR1 at the soft limit and no TERM"),
    ],
)
def test_what_grid_engine_cannot_do(fields, message):
    with pytest.raises(UserError, match=message):
        render("abci-v", **JOB, **fields)
