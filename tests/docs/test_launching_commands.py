"""Every command line in the guides on launching is rendered or run, and one that no test knows fails.

Of ours: `launch` is rendered, and submitted to stand-ins of the schedulers; `doctor` runs over a stand-in of mpirun;
the others are parsed. Other people's programs are stand-ins too, which refuse files of ours that do not exist.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_ru
from megatron_ru.commands.main import build_parser, discover_commands
from megatron_ru.launch.target import TARGETS
from tests.docs.test_documents import our_words

PROJECT = Path(megatron_ru.__file__).parents[1]
GUIDES = ("launching.md", "restarts.md", "doctor.md", "containers.md")
PAGES = [PROJECT / "docs" / language / guide for language in ("en", "ru") for guide in GUIDES]
# Programs that are played; bash is real.
PLAYED = ("docker", "apptainer", "enroot", "sbatch", "qsub", "squeue", "sinfo", "scancel", "mpirun", "torchrun")
# Takes a job on its standard input as sbatch and qsub do, and leaves what it was given in files.
STAND_IN = """#!/bin/bash
name=$(basename "$0")
for word in "$@"; do printf '%s\\n' "$word"; done >"$PLAYED/$name.words"
for word in "$@"; do
    case $word in launch/*) [ -e "$word" ] || { echo "$word does not exist" >&2; exit 3; } ;; esac
done
case $name in
    sbatch | qsub) cat >"$PLAYED/$name.job"; echo 12345 ;;
    enroot) echo image >"$3" ;;
esac
"""


def lines_of(page):
    """The command lines of the page's bash blocks, without comments."""
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)


LINES = {}
for guide in PAGES:
    for found in lines_of(guide):
        LINES.setdefault(found, f"{guide.parent.name}/{guide.name}")
OURS = {line: our_words(line) for line in LINES}


def lines(kind):
    """Those of one of our commands, or with None those of others."""
    chosen = [line for line, words in OURS.items() if (words[0] if words else None) == kind]
    return pytest.mark.parametrize("line", chosen, ids=lambda line: f"{LINES[line]}: {line[:60]}")


def is_ours(line):
    """Whether our console script is what the line starts, and not a program that it hands to docker."""
    return program_of(line) == "megatron-ru"


def program_of(line):
    """The first word that is no assignment."""
    return next(word for word in shlex.split(line) if not re.match(r"[A-Za-z_]\w*=", word))


@pytest.fixture
def shell(tmp_path):
    """Runs a line in a folder like a clone, with stand-ins for other people's programs."""
    played = tmp_path / "played"
    played.mkdir()
    shutil.copytree(PROJECT / "launch", tmp_path / "clone" / "launch")
    (tmp_path / "clone" / "hostfile").write_text("gpu1\ngpu2\n")
    for name in PLAYED:
        (played / name).write_text(STAND_IN)
        (played / name).chmod(0o755)
    (played / "megatron-ru").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m megatron_ru "$@"\n')
    (played / "megatron-ru").chmod(0o755)

    def run(line):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
        environ |= {"PATH": f"{played}:/usr/bin:/bin", "PLAYED": str(played), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path / "clone", env=environ, capture_output=True, text=True, timeout=120
        )

    run.played = played
    run.folder = tmp_path / "clone"
    return run


def test_guides_hold_commands_for_every_target():
    targets = {words[1] for words in OURS.values() if words and words[0] == "launch"}
    assert targets == set(TARGETS)
    assert {program_of(line) for line, words in OURS.items() if not words} >= {"bash", "squeue", "apptainer"}


@lines("launch")
def test_launch_is_rendered_and_goes_where_it_says(shell, line):
    from megatron_ru.commands.launch import job_of

    arguments = build_parser(discover_commands()).parse_args(OURS[line])
    script = TARGETS[arguments.target].render(job_of(arguments))
    assert subprocess.run(["bash", "-n"], input=script.content).returncode == 0
    if script.submit[0] == "bash":
        return  # tests/launch/targets runs scripts of these kinds
    shown = shell(line)
    assert shown.returncode == 0, shown.stderr
    job = shell.played / f"{script.submit[0]}.job"
    if arguments.submit:
        assert shown.stdout == "12345\n"
    if arguments.submit or arguments.check:
        assert job.read_bytes() == script.content
        asked = script.submit if arguments.submit else script.check
        assert (shell.played / f"{script.submit[0]}.words").read_text().splitlines() == list(asked[1:])
    else:
        assert shown.stdout.encode() == script.content
        assert not job.exists()


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "shellcheck").exists(), reason="no shellcheck beside this Python"
)
def test_rendered_scripts_pass_shellcheck(tmp_path):
    from megatron_ru.commands.launch import job_of

    files = []
    for words in OURS.values():
        if words and words[0] == "launch":
            arguments = build_parser(discover_commands()).parse_args(words)
            files.append(tmp_path / f"{len(files)}.sh")
            files[-1].write_bytes(TARGETS[arguments.target].render(job_of(arguments)).content)
    shown = subprocess.run([str(Path(sys.executable).parent / "shellcheck"), *files], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout


def test_commands_that_are_launched_parse():
    """What stands behind --, where it is ours and has a parser of ours."""
    modules, parsed = discover_commands(), 0
    for line, words in OURS.items():
        if not words or words[0] != "launch":
            continue
        behind = words[words.index("--") + 1 :]
        inner = our_words(shlex.join(behind))
        if inner is None or hasattr(modules[inner[0]], "run_raw"):
            assert inner is not None or behind[0] == "bash", line
            continue
        assert build_parser(modules).parse_args(inner).command == inner[0]
        parsed += 1
    assert parsed >= 4


@lines("doctor")
def test_doctor_goes_to_the_hosts_that_it_names(shell, line):
    if not is_ours(line):
        return  # docker starts it: see below
    shown = shell(line)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    words = OURS[line]
    if "--nodes" not in words:
        assert "python " in shown.stdout
        assert "--json" not in words or (shell.folder / words[words.index("--json") + 1]).exists()
        return
    mpirun = (shell.played / "mpirun.words").read_text().splitlines()
    ranks = 2 * int(words[words.index("--gpus-per-node") + 1] if "--gpus-per-node" in words else 1)
    assert mpirun[:2] == ["-np", str(ranks)]
    behind = mpirun[mpirun.index("megatron_ru") :]
    assert behind[:4] == ["megatron_ru", "doctor", "--nodes", "auto"]
    assert ("--strict" in behind) == ("--strict" in words)


def test_other_commands_of_ours_parse():
    """`guard` and the like; `launch` and `doctor` are run above."""
    modules = discover_commands()
    for words in OURS.values():
        if words and words[0] not in ("launch", "doctor") and not hasattr(modules[words[0]], "run_raw"):
            assert build_parser(modules).parse_args(words).command == words[0]


OTHERS = [line for line in LINES if not is_ours(line)]


@pytest.mark.parametrize("line", OTHERS, ids=lambda line: f"{LINES[line]}: {line[:60]}")
def test_commands_of_others_run(shell, line):
    """A program that is not played here is not found: add it to PLAYED, or a test that runs it."""
    shown = shell(line)
    assert shown.returncode == 0, shown.stderr
    program = program_of(line)
    if program == "bash":
        (uri,) = re.findall(r"(?m)^(?:dockerd?|docker)://\S+", (shell.played / "enroot.words").read_text())
        assert uri
        return
    words = shlex.split(line)
    assert (shell.played / f"{program}.words").read_text().splitlines() == words[words.index(program) + 1 :]


def test_recipes_name_files_that_exist(shell):
    assert shell("docker build --file launch/containers/Dockerfile .").returncode == 0
    shown = shell("docker build --file launch/containers/Nofile .")
    assert (shown.returncode, shown.stderr) == (3, "launch/containers/Nofile does not exist\n")
