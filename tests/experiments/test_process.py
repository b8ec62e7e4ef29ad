import os
import sys
import time

import pytest

from megatron_ru.experiments.process import RunFailed, run_logged

ENVIRONMENT = dict(os.environ)


def python(program):
    return [sys.executable, "-c", program]


def test_output_is_appended_to_the_log_and_the_run_is_watched(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("before\n")
    seen = []
    run_logged("a", python("import sys; print(1, flush=True); print(2, file=sys.stderr)"), log, ENVIRONMENT,
               lambda: seen.append(1), seconds_between=0.01)  # fmt: skip
    assert log.read_text() == "before\n1\n2\n"
    assert len(seen) >= 1


def test_stdout_can_go_elsewhere(tmp_path):
    run_logged("a", python("import sys; print('ответ'); print('шум', file=sys.stderr)"), tmp_path / "a.log",
               {**ENVIRONMENT, "PYTHONUTF8": "1"}, stdout=tmp_path / "answer")  # fmt: skip
    assert (tmp_path / "answer").read_text(encoding="utf-8") == "ответ\n"
    assert (tmp_path / "a.log").read_text(encoding="utf-8") == "шум\n"


def test_a_failure_shows_the_end_of_this_run_and_names_the_log(tmp_path, capfd):
    log = tmp_path / "a.log"
    log.write_text("an earlier run\n")
    with pytest.raises(RunFailed) as raised:
        run_logged("training", python("print(*range(100), sep='\\n'); raise SystemExit(7)"), log, ENVIRONMENT)
    assert str(raised.value) == f"training ended with exit code 7; the whole log is {log}"
    assert raised.value.exit_code == 1
    shown = capfd.readouterr().err
    assert shown == f"\nthe last lines of {log}:\n" + "\n".join(map(str, range(85, 100))) + "\n"


def test_the_sentence_of_a_rank_is_shown_alone(tmp_path, capfd):
    program = "print('x: error: bad data'); print('launcher page\\n' * 30); raise SystemExit(1)"
    with pytest.raises(RunFailed):
        run_logged("training", python(program), tmp_path / "a.log", ENVIRONMENT)
    assert capfd.readouterr().err == f"\nthe last lines of {tmp_path / 'a.log'}:\nx: error: bad data\n"


def test_a_signal_is_named(tmp_path):
    with pytest.raises(RunFailed, match="training ended with signal SIGKILL; "):
        run_logged("training", python("import os; os.kill(os.getpid(), 9)"), tmp_path / "a.log", ENVIRONMENT)


def test_children_end_with_the_wait(tmp_path):
    child = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys, time; "
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "a.log"

    def interrupt():
        if log.exists() and log.read_text().endswith("\n"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_logged("a", python(program), log, ENVIRONMENT, interrupt, seconds_between=0.01)
    grandchild = int(log.read_text())
    for _ in range(100):
        if not alive(grandchild):
            return
        time.sleep(0.05)
    pytest.fail(f"process {grandchild} outlived its run")


def alive(pid):
    """Whether the process runs; an orphan that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
