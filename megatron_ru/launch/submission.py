"""Handing a script to the program that runs it, or asking that program what it thinks."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.target import LaunchScript


def check(script: LaunchScript, target: str) -> int:
    """The exit code of the scheduler's own check, whose words go to the terminal.

    Raises UserError where the scheduler has none or is not installed here.
    """
    if script.check is None:
        raise UserError(
            f"the scheduler of {target} cannot check a job without starting it; the values themselves are fine: "
            "read the script with --dry-run, then --submit"
        )
    _require(script.check[0], target)
    return subprocess.run(script.check, input=script.content).returncode


def submit(script: LaunchScript, target: str, output: str) -> int:
    """The exit code of the program that takes the script; the job's id, and nothing else, on stdout.

    A script for bash runs here and now, with this process's stdin, and its exit code is that of the job. Raises
    UserError for a program that is missing.
    """
    _require(script.submit[0], target)
    if script.submit == ("bash",):
        return _run_by_bash(script)
    # Schedulers lose the output of a job, or the job, where its folder is missing.
    Path(output).mkdir(parents=True, exist_ok=True)
    answer = subprocess.run(script.submit, input=script.content, stdout=subprocess.PIPE)
    said = answer.stdout.decode(errors="replace")
    if answer.returncode == 0:
        print(job_id(said))
    else:
        sys.stderr.write(said)
    return answer.returncode


def job_id(said: str) -> str:
    """The id in what `sbatch --parsable` (`12;cluster`), `qsub -terse` (`12.1-8:1`) or PBS (`12.server`) printed.

    That is the last line, since sites greet people; without the cluster of Slurm and the tasks of Grid Engine.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return ""
    return re.sub(r"^(\d+)(?:;.*|\.\d+-\d+:\d+)$", r"\1", lines[-1])


def _run_by_bash(script: LaunchScript) -> int:
    """Bash reads the bytes from a file in memory, so that the job's stdin is not the rest of its script."""
    descriptor = os.memfd_create("megatron-ru-launch", 0)
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(script.content)
        code = _call(("bash", f"/dev/fd/{descriptor}"), descriptor)
    finally:
        os.close(descriptor)
    return 128 - code if code < 0 else code


def _call(words: Sequence[str], descriptor: int) -> int:
    os.lseek(descriptor, 0, os.SEEK_SET)
    # Its guard shall be this very package, also where another python3 comes first on PATH.
    child = subprocess.Popen(words, pass_fds=(descriptor,), env={**os.environ, "RU_PYTHON": sys.executable})
    try:
        return child.wait()
    except BaseException:
        # Ctrl-C reached bash as well; a SIGTERM reached only this process.
        child.terminate()
        child.wait()
        raise


def _require(program: str, target: str) -> None:
    if shutil.which(program) is None:
        raise UserError(
            f"{target} needs {program}, and there is none on PATH: run this where jobs are submitted, "
            "or carry the script there from --dry-run"
        )
