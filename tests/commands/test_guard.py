"""The words of `megatron-ru guard` and `megatron-ru keep`; what they do is in tests/launch/guard."""

import json
import socket
import subprocess
import sys

import pytest

from megatron_ru.commands.main import main


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stall", "0"], "--stall 0 is not between 0.1 and 10000000"),
        (["--retries", "-1"], "--retries -1 is not between 0 and"),
        (["--nodes", "2", "--node", "2"], "--node 2 is not between 0 and 1"),
        (["--nodes", "2"], "2 nodes have to know the guard's port: give the same --port to each"),
        (["--signal-after", "KILL@3"], "--signal-after 'KILL@3' is not USR1, USR2, TERM or INT with @SECONDS"),
        (["--spares", "1"], "hosts cannot be left out of true: give its --hostfile, or leave --spares out"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(words, sentence, capsys):
    assert main(["guard", *words, "--", "true"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_a_spare_host_needs_a_hostfile_that_is_there(tmp_path, capsys):
    (tmp_path / "hosts").write_text("n1\n")
    assert main(["guard", "--spares", "1", "--hostfile", str(tmp_path / "hosts"), "--", "mpirun"]) == 2
    assert "lists 1 hosts, of which 1 are spare" in capsys.readouterr().err


def test_a_taken_port_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["guard", "--port", str(port), "--", "true"]
        shown = subprocess.run([sys.executable, "-m", "megatron_ru", *words], capture_output=True, text=True)
    assert shown.returncode == 2
    assert shown.stderr == (
        f"megatron-ru: error: the guard cannot listen on port {port} (Address already in use): is another one running "
        "here? Give another port\n"
    )


def test_words_of_the_launcher_are_its_own(tmp_path):
    words = ["guard", "--grace", "1", "--", "bash", "-c", 'printf "%s\\n" "$@"', "x", "--grace", "--", "a b", "$(c)"]
    shown = subprocess.run([sys.executable, "-m", "megatron_ru", *words], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "--grace\n--\na b\n$(c)\n", "")


def test_a_guard_has_a_line_for_each_of_many_ranks_and_its_launcher_the_limit_that_it_would_have_had():
    show = 'ulimit -Sn; grep "open files" /proc/$PPID/limits'
    program = f"ulimit -Sn 512; exec {sys.executable} -m megatron_ru guard -- bash -c '{show}'"
    shown = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    own, guards = shown.stdout.splitlines()
    assert own == "512"
    assert int(guards.split()[3]) > 512


def test_a_report_is_a_line_for_each_attempt(tmp_path):
    report = tmp_path / "reports" / "one.jsonl"
    words = [
        "guard",
        "--retries",
        "1",
        "--back-off",
        "0",
        "--job",
        "12",
        "--",
        "bash",
        "-c",
        "exit $((5 - RU_ATTEMPT))",
    ]
    program = [sys.executable, "-m", "megatron_ru", *words]
    shown = subprocess.run(program, env={"PATH": "/usr/bin:/bin", "RU_GUARD_REPORT": str(report)}, capture_output=True)
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert shown.returncode == 4
    assert [(one["job"], one["attempt"], one["exit_code"], one["again"]) for one in records] == [
        ("12", 0, 5, True), ("12", 1, 4, False),
    ]  # fmt: skip
    assert all(0 < one["attempt_seconds"] < 10 for one in records)


@pytest.mark.parametrize(("words", "code"), [(["-h"], 0), (["--help"], 0), ([], 2), (["--"], 2)])
def test_keep_says_what_it_is(words, code, capsys):
    assert main(["keep", *words]) == code
    assert "usage: megatron-ru keep -- COMMAND" in capsys.readouterr().out
