import subprocess

import pytest

from megatron_ru.foundation.errors import UserError
from tests.launch.targets.scripts import header, render, requeue_lines

JOB = {"nodes": 2, "time": "2d", "group": "gaa50000"}


def test_header_and_start():
    script = render("abci-h", **JOB, guard=False)
    assert header(script) == [
        "-P gaa50000", "-q rt_HF", "-N megatron-ru", "-l select=2", "-l walltime=48:00:00", "-j oe", "-o ./", "-r n",
    ]  # fmt: skip
    assert '\nmpirun -np 16 -npernode 8 \\\n    -hostfile "$ru_hostfile" ' in script.text
    assert 'ru_free_port "${PBS_JOBID%%[!0-9]*}" ' in script.text
    assert (script.submit, script.check) == (("qsub",), None)


def test_everything_else_that_pbs_takes():
    script = render(
        "abci-h", **JOB, queue="R9", array="0-8:2%3", dependency="afterok:12.pbs1", requeue=True, signal="TERM",
        signal_seconds=60, output="logs", guard=False,
    )  # fmt: skip
    assert header(script)[1] == "-q R9"
    assert header(script)[6:] == ["-o logs/", "-r y", "-J 0-8:2%3", "-W depend=afterok:12.pbs1"]
    assert "\ntimeout --foreground --preserve-status --signal=TERM 172740 mpirun -np 16 " in script.text
    assert '\nexport RU_ARRAY_INDEX="$PBS_ARRAY_INDEX"\n' in script.text


def test_the_guard_gives_the_signal_and_the_script_submits_itself_again(tmp_path):
    text = render("abci-h", **JOB, requeue=True, retries=2, signal="USR1", signal_seconds=60).text
    assert '--address "$MASTER_ADDR" --retries 2 --signal-after USR1@172740 -- \\\n    mpirun ' in text
    assert "timeout --foreground" not in text
    (tmp_path / "job").write_text(requeue_lines(text, "set -euo pipefail\nru_code=$CODE\n"))
    (tmp_path / "qsub").write_text('#!/bin/bash\necho "$*" >>"$SENT"\n')
    (tmp_path / "qsub").chmod(0o755)

    def run(code, requeues=""):
        environ = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "CODE": code,
            "RU_REQUEUES": requeues,
            "SENT": f"{tmp_path}/sent",
        }
        (tmp_path / "sent").write_text("")
        ended = subprocess.run(["bash", str(tmp_path / "job")], env=environ, capture_output=True, text=True)
        return ended.returncode, (tmp_path / "sent").read_text()

    assert run("75") == (75, f"-v RU_REQUEUES=1 {tmp_path}/job\n")
    assert run("75", "1") == (75, f"-v RU_REQUEUES=2 {tmp_path}/job\n")
    assert run("75", "2") == (75, "")
    assert run("75", "$(touch x)") == (75, f"-v RU_REQUEUES=1 {tmp_path}/job\n")
    assert run("7") == (7, "")


def test_a_task_of_an_array_is_not_submitted_again():
    assert "cannot be submitted again" in render("abci-h", **JOB, requeue=True, array="1-4").text
    assert "cannot be submitted again" not in render("abci-h", **JOB, array="1-4").text


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"dependency": "singleton"}, "PBS knows no singleton"), ({"signal": "INT"}, "USR1, USR2 and TERM on .* no INT")],
)
def test_what_pbs_cannot_do(fields, message):
    with pytest.raises(UserError, match=message):
        render("abci-h", **JOB, **fields)
