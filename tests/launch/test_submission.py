import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch import submission
from megatron_ru.launch.target import LaunchScript


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder at the front of PATH; `add(name, text)` puts a bash program there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def add(name, text):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return add


@pytest.mark.parametrize(
    ("said", "identity"),
    [
        ("123\n", "123"),
        ("123;cluster\n", "123"),
        ("123.1-8:1\n", "123"),
        ("123.pbs1\n", "123.pbs1"),
        ("123[].pbs1\n", "123[].pbs1"),
        ("Welcome!\n\n123\n", "123"),
        ("", ""),
    ],
)
def test_job_id(said, identity):
    assert submission.job_id(said) == identity


def test_submit_pipes_the_bytes_and_prints_the_id_alone(tmp_path, programs, capfd):
    programs("qsub", f'echo "$*" > {tmp_path}/words; cat > {tmp_path}/sent; echo note >&2; echo 77.1-3:1')
    script = LaunchScript(text="#!/bin/bash\necho ё\n", submit=("qsub", "-g", "g1", "-terse"))
    assert submission.submit(script, "abci-v", str(tmp_path / "logs")) == 0
    assert (tmp_path / "sent").read_bytes() == script.content
    assert (tmp_path / "words").read_text() == "-g g1 -terse\n"
    assert capfd.readouterr() == ("77\n", "note\n")
    assert (tmp_path / "logs").is_dir()


def test_submit_passes_the_schedulers_code_and_words_on(tmp_path, programs, capfd):
    programs("sbatch", "cat >/dev/null; echo why; exit 9")
    script = LaunchScript(text="x\n", submit=("sbatch", "--parsable"))
    assert submission.submit(script, "slurm", str(tmp_path)) == 9
    assert capfd.readouterr() == ("", "why\n")


def test_check_asks_the_scheduler(tmp_path, programs):
    programs("sbatch", f'echo "$*" > {tmp_path}/words; cat > {tmp_path}/sent; exit 3')
    script = LaunchScript(text="x\n", submit=("sbatch",), check=("sbatch", "--test-only"))
    assert submission.check(script, "slurm") == 3
    assert (tmp_path / "sent").read_bytes() == b"x\n"
    assert (tmp_path / "words").read_text() == "--test-only\n"


def test_a_scheduler_without_a_check():
    with pytest.raises(UserError, match="the scheduler of abci-h cannot check a job without starting it"):
        submission.check(LaunchScript(text="x\n", submit=("qsub",)), "abci-h")


def test_a_missing_program_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    script = LaunchScript(text="x\n", submit=("qsub",), check=("qsub", "-w", "v"))
    for call in (lambda: submission.check(script, "abci-v"), lambda: submission.submit(script, "abci-v", ".")):
        with pytest.raises(UserError, match=r"^abci-v needs qsub, and there is none on PATH: run this where jobs are"):
            call()


def test_a_script_for_bash_runs_here_with_our_stdin_and_its_own_code(capfd):
    program = (
        "from megatron_ru.launch import submission\n"
        "from megatron_ru.launch.target import LaunchScript\n"
        "import sys\n"
        "script = LaunchScript(text='#!/bin/bash\\nread word\\necho \"read $word\"\\nexit 7\\n', submit=('bash',))\n"
        "sys.exit(submission.submit(script, 'local', '.'))\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], input="hello\n", capture_output=True, text=True)
    assert (shown.returncode, shown.stdout, shown.stderr) == (7, "read hello\n", "")
    killed = LaunchScript(text="kill -KILL $$\n", submit=("bash",))
    assert submission.submit(killed, "local", ".") == 137


def test_a_terminated_launch_takes_its_ranks_with_it(tmp_path):
    rank = f"echo $$ >> {tmp_path}/ranks; exec sleep 60"
    words = ["launch", "local", "--gpus-per-node", "2", "--submit", "--", "bash", "-c", rank]
    launch = subprocess.Popen([sys.executable, "-m", "megatron_ru", *words])
    ranks = tmp_path / "ranks"
    deadline = time.monotonic() + 30
    while not ranks.exists() or len(ranks.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launch.send_signal(signal.SIGTERM)
    assert launch.wait(timeout=30) == 143
    for number in ranks.read_text().split():
        while os.path.exists(f"/proc/{number}") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not os.path.exists(f"/proc/{number}")
