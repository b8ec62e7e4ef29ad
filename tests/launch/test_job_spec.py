import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.field_help import field_help
from megatron_ru.launch.job_spec import JobSpec, array_bounds


def job(**fields):
    return JobSpec(**{"target": "slurm", "command": ("true",), **fields})


def test_sizes():
    large = job(nodes=16, gpus_per_node=4, tensor_parallel=4, pipeline_parallel=8, time="1-08:00:00")
    assert (large.world_size, large.data_parallel, large.seconds) == (64, 2, 115200)
    assert job().seconds is None
    assert job(nodes=4, spares=2, retries=3).all_nodes == 6
    assert [job().most_requeues, job(retries=3).most_requeues] == [10, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 0}, "nodes: 0 is not between 1 and 100000"),
        ({"gpus_per_node": -1}, "GPUs per node: -1 is not between 1 and 1024"),
        ({"cpus_per_task": 0}, "CPUs per task: 0"),
        ({"command": ()}, "there is no command to launch: write it behind --"),
        ({"command": ("",)}, "there is no command to launch"),
        ({"command": ("--nodes", "2")}, "begins with '--nodes'; expected a program"),
        ({"command": ("A=1", "run")}, "begins with 'A=1'; expected a program there: set variables with --env"),
        ({"command": ("echo", "a\nb")}, "a word of the command holds U\\+000A at character 2"),
        ({"name": "7b"}, "the job's name is '7b'; expected a letter, then"),
        ({"name": "a b"}, "the job's name is 'a b'"),
        ({"name": "a\n#SBATCH --x"}, "the job's name"),
        ({"name": "a\n"}, "the job's name"),
        ({"name": "a" * 64}, "up to 63"),
        ({"group": "g; rm"}, "the group is 'g; rm'"),
        ({"queue": "$(x)"}, "the queue is"),
        ({"modules": ("cuda/12 -f",)}, "a module is 'cuda/12 -f'; expected a name such as cuda/12.4"),
        ({"interfaces": ("bond0;x",)}, "an interface is 'bond0;x'"),
        ({"output": "my logs"}, "the output folder is 'my logs'; expected letters"),
        ({"output": "$HOME/x"}, "the output folder"),
        ({"output": "-x"}, "as an option"),
        ({"hostfile": "-x"}, "the hostfile is '-x', which programs read as an option: write ./-x"),
        ({"container": "i", "mounts": ("/a",)}, "a mount is '/a'; expected HOST:/CONTAINER"),
        ({"container": "i", "mounts": ("/a:/b,/c:/d",)}, "a mount is '/a:/b,/c:/d'"),
        ({"mounts": ("/a:/b",)}, "1 mounts without a container"),
        ({"container": "i", "virtual_environment": ".venv"}, "does not work inside a container"),
        ({"env": {"1A": "x"}}, "a variable's name is '1A'"),
        ({"env": {"A;B": "x"}}, "a variable's name is 'A;B'"),
        ({"env": {"A\n": "x"}}, "a variable's name"),
        ({"env": {"A": "x\ny"}}, "the value of A holds U\\+000A"),
        ({"env": {"MASTER_ADDR": "h"}}, "MASTER_ADDR is what the launcher itself gives to each rank"),
        ({"env": {"IFS": ","}}, "IFS belongs to the job script or to bash"),
        ({"env": {"ru_command": "x"}}, "ru_command belongs to the job script"),
        ({"time": "tomorrow"}, "time limit 'tomorrow' is not HH:MM:SS"),
        ({"array": "1,2"}, "array '1,2' is not FIRST-LAST"),
        ({"array": "1-4:0"}, "array '1-4:0' is not"),
        ({"array": "4-4"}, "counts from 4 to 4; expected the larger number last"),
        ({"dependency": "afterok"}, "the dependency is 'afterok'; expected afterok:JOB"),
        ({"dependency": "afterok:1 --x"}, "the dependency"),
        ({"signal": "KILL", "time": "1h"}, "signal 'KILL' is none of USR1, USR2, TERM, INT"),
        ({"signal": "USR1"}, "USR1 before the time limit needs a limit: add --time"),
        ({"signal": "USR1", "time": "5m"}, "USR1 300 s before a limit of 300 s would come before the start"),
        ({"retries": -1}, "--retries -1 is not between 0 and 1000"),
        ({"stall": 0.0}, "--stall 0 is not between 0.1 and"),
        ({"start_timeout": float("nan")}, "--start-timeout nan is not between"),
        ({"grace": float("inf")}, "--grace inf is not between 0 and"),
        ({"spares": -1, "retries": 2}, "--spares -1 is not between 1 and 1000"),
        ({"spares": 1}, "1 spare nodes are for further attempts: add --retries 2 or more"),
        ({"stall": 60.0, "guard": False}, "--stall is for the guard, which --no-guard leaves out: drop one of them"),
        ({"retries": 3, "guard": False}, "--retries is for the guard, which --no-guard leaves out"),
        ({"requeue": True, "retries": 3, "guard": False}, "--retries is for the guard, which --no-guard leaves out"),
        ({"env": {"RU_GUARD": "x"}}, "RU_GUARD belongs to the job script"),
        ({"nodes": 3, "tensor_parallel": 4, "pipeline_parallel": 4},
         "3 nodes x 8 GPUs = 24 ranks do not divide into model replicas of TP 4 x PP 4 = 16: start a multiple of 16"),
    ],
)  # fmt: skip
def test_one_sentence_for_each_rule(fields, message):
    with pytest.raises(UserError, match=message):
        job(**fields)


@pytest.mark.parametrize(
    "dependency",
    ["afterok:12", "afterany:12:13", "afternotok:12_3", "afterok:12[].server", "afterok:12.server", "singleton"],
)
def test_dependencies_as_schedulers_write_them(dependency):
    assert job(dependency=dependency).dependency == dependency


def test_array_bounds():
    assert array_bounds("1-8") == (1, 8, 1, None)
    assert array_bounds("0-10:2%3") == (0, 10, 2, 3)


def test_every_field_has_its_help():
    found = field_help(JobSpec)
    assert found.keys() == JobSpec.__dataclass_fields__.keys()
    assert found["nodes"] == "Number of nodes."
    # Written over two lines.
    assert found["array"].endswith("The command reads its number from RU_ARRAY_INDEX.")
