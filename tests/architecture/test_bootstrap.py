"""scripts/bootstrap.sh with stand-ins for Python and pip: what it says, and when it installs again."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "cut", "dirname", "find", "rm", "sha256sum", "sort", "xargs", "env")

OLD_PYTHON = '#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.11.2" && exit 0\nexit 1\n'
SHIM = '#!/bin/sh\necho "python3.12: command not found" >&2\nexit 127\n'
WITHOUT_VENV = '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *print*) echo 3.12;; esac\n'
# Stands in a .venv: notes how pip was called, and fails when told to.
INSTALLED = '#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "$@" >>pip.log\n[ ! -e pip-fails ]\n'


class Clone:
    """A folder with the files that bootstrap.sh looks at, and a PATH on which only known programs are."""

    def __init__(self, folder):
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        (folder / "scripts").mkdir()
        shutil.copy(PROJECT / "scripts" / "bootstrap.sh", folder / "scripts")
        (folder / "pyproject.toml").write_text("[project]\n")
        (folder / "setup.py").write_text("")
        for tool in TOOLS:
            (self.programs / tool).symlink_to(shutil.which(tool))
        self.program("g++", "#!/bin/sh\n")

    def program(self, path, text):
        target = self.programs / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755)
        return target

    def bootstrap(self, extras="dev", **environ):
        environ = {"PATH": str(self.programs), "HOME": str(self.folder), **environ}
        program = ["bash", str(self.folder / "scripts" / "bootstrap.sh"), extras]
        return subprocess.run(program, env=environ, capture_output=True, text=True, cwd=os.sep)

    def with_venv(self):
        self.program(self.folder / ".venv" / "bin" / "python", INSTALLED)
        return self

    @property
    def pip_calls(self):
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def one_line(shown):
    assert shown.returncode == 2, shown.stdout
    assert shown.stderr.count("\n") == 1, shown.stderr
    return shown.stderr.strip()


def test_old_python_and_a_failing_shim(clone):
    clone.program("python3", OLD_PYTHON)
    clone.program("python3.12", SHIM)
    assert one_line(clone.bootstrap()) == (
        "megatron-ru: no Python 3.12 or newer was found (python3 is Python 3.11.2): "
        "apt install python3.12 python3.12-venv, or set PYTHON=/path/to/python3.12"
    )
    assert not (clone.folder / ".venv").exists()


def test_no_python_at_all(clone):
    assert "(python3 is missing)" in one_line(clone.bootstrap())


def test_version_manager_s_python_is_found_behind_its_shim_and_needs_the_venv_module(clone):
    clone.program("python3.12", SHIM)
    python = clone.program(clone.folder / ".pyenv/versions/3.12.9/bin/python3.12", WITHOUT_VENV)
    message = f"megatron-ru: Python 3.12 ({python}) has no venv module: apt install python3.12-venv"
    assert one_line(clone.bootstrap()) == message
    assert not (clone.folder / ".venv").exists()


def test_missing_compiler(clone):
    (clone.programs / "g++").unlink()
    assert one_line(clone.bootstrap()) == (
        "megatron-ru: no C++ compiler was found, which builds the dataset index: apt install g++"
    )


def test_wrong_settings(clone):
    message = one_line(clone.bootstrap(PYTHON="no-such-python"))
    assert "PYTHON=no-such-python does not run as Python 3.12 or newer: correct or unset it" in message
    assert "CONSTRAINTS=nowhere is not a file" in one_line(clone.bootstrap(CONSTRAINTS="nowhere"))


def test_venv_that_lost_its_python(clone):
    (clone.folder / ".venv").mkdir()
    assert "rm -rf .venv and run this again" in one_line(clone.bootstrap())


def test_installs_once_and_again_only_after_a_change(clone):
    clone.with_venv()
    for _ in range(2):
        assert clone.bootstrap("demo").returncode == 0
    assert len(clone.pip_calls) == 1
    assert clone.pip_calls[0].endswith("--editable .[demo,mpi,data]")
    (clone.folder / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    for _ in range(2):
        assert clone.bootstrap("demo").returncode == 0
    assert len(clone.pip_calls) == 2


def test_tests_environment_serves_the_demo_and_not_the_other_way(clone):
    clone.with_venv()
    for extras in ("demo", "dev", "demo", "dev"):
        assert clone.bootstrap(extras).returncode == 0
    assert [re.search(r"\[.*\]", call)[0] for call in clone.pip_calls] == ["[demo,mpi,data]", "[dev]"]


def test_lock_is_given_to_pip_and_its_change_counts(clone):
    clone.with_venv()
    lock = clone.folder / "lock.txt"
    for version in ("1", "1", "2"):
        lock.write_text(f"torch=={version}\n")
        assert clone.bootstrap(CONSTRAINTS="lock.txt").returncode == 0
    assert len(clone.pip_calls) == 2
    assert "--constraint lock.txt --editable .[dev]" in clone.pip_calls[0]


def test_ops_are_compiled_again_only_after_their_sources_or_the_installation_changed(clone):
    clone.with_venv()
    (clone.folder / "csrc").mkdir()
    (clone.folder / "megatron_ru/ops").mkdir(parents=True)
    (clone.folder / "megatron_ru/ops/build.py").write_text("")
    source = clone.folder / "csrc/kernel.cpp"

    def calls_after(change, **environ):
        change()
        before = len(clone.pip_calls)
        for _ in range(2):
            assert clone.bootstrap(**environ).returncode == 0
        return [" ".join(call.split()[:3]) for call in clone.pip_calls[before:]]

    assert calls_after(lambda: source.write_text("one")) == ["-m pip install", "-m megatron_ru build"]
    assert calls_after(lambda: source.write_text("two")) == ["-m megatron_ru build"]
    assert calls_after(lambda: (clone.folder / "setup.py").write_text("# new")) == [
        "-m pip install", "-m megatron_ru build",
    ]  # fmt: skip
    assert calls_after(lambda: None, MEGATRON_RU_BUILD="none") == ["-m megatron_ru build"]


def test_ops_that_do_not_compile_are_told_and_tried_again(clone):
    clone.with_venv()
    assert clone.bootstrap().returncode == 0
    (clone.folder / "csrc").mkdir()
    (clone.folder / "megatron_ru/ops").mkdir(parents=True)
    (clone.folder / "megatron_ru/ops/build.py").write_text("")
    (clone.folder / "pip-fails").touch()
    for _ in range(2):
        shown = clone.bootstrap()
        assert shown.returncode == 0
        assert "the ops were not compiled (the reason stands above): they run in plain torch" in shown.stderr
    assert len(clone.pip_calls) == 3


def test_failed_installation_is_tried_again(clone):
    clone.with_venv()
    (clone.folder / "pip-fails").touch()
    assert "pip could not install the package" in one_line(clone.bootstrap())
    (clone.folder / "pip-fails").unlink()
    assert clone.bootstrap().returncode == 0
    assert len(clone.pip_calls) == 2
