import pytest

from megatron_ru.foundation.errors import UserError
from tests.launch.targets.scripts import header, render

JOB = {"nodes": 2, "time": "2d", "group": "gaa50000"}


def test_header_and_start():
    script = render("abci-h", **JOB)
    assert header(script) == [
        "-P gaa50000", "-q rt_HF", "-N megatron-ru", "-l select=2", "-l walltime=48:00:00", "-j oe", "-o ./", "-r n",
    ]  # fmt: skip
    assert '\nmpirun -np 16 -npernode 8 -hostfile "$ru_hostfile" ' in script.text
    assert 'ru_free_port "${PBS_JOBID%%[!0-9]*}" ' in script.text
    assert (script.submit, script.check) == (("qsub",), None)


def test_everything_else_that_pbs_takes():
    script = render(
        "abci-h", **JOB, queue="R9", array="0-8:2%3", dependency="afterok:12.pbs1", requeue=True, signal="TERM",
        signal_seconds=60, output="logs",
    )  # fmt: skip
    assert header(script)[1] == "-q R9"
    assert header(script)[6:] == ["-o logs/", "-r y", "-J 0-8:2%3", "-W depend=afterok:12.pbs1"]
    assert "\ntimeout --foreground --preserve-status --signal=TERM 172740 mpirun -np 16 " in script.text
    assert '\nexport RU_ARRAY_INDEX="$PBS_ARRAY_INDEX"\n' in script.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"dependency": "singleton"}, "PBS knows no singleton"), ({"signal": "INT"}, "USR1, USR2 and TERM on .* no INT")],
)
def test_what_pbs_cannot_do(fields, message):
    with pytest.raises(UserError, match=message):
        render("abci-h", **JOB, **fields)
