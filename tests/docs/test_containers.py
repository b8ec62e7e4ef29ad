"""launch/containers: torch of the image is never installed again, and the files that an image is made of exist.

No image is built here. install.sh runs in a virtual environment that stands for the image, with a torch of the version
that NVIDIA's images have, against a folder of wheels that also holds a newer torch.
"""

import fnmatch
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import megatron_ru

PROJECT = Path(megatron_ru.__file__).parents[1]
FOLDER = PROJECT / "launch" / "containers"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
IMAGE_TORCH = "2.8.0a0+5228986c39.nv25.6"
PINNED = {
    "torch": IMAGE_TORCH, "flash_attn": "2.7.3", "transformer_engine": "2.4.0+3cd6870", "pytorch_triton": "3.3.0",
    "nvidia_dali": "1.50", "speaks_to_torch": "1.0",
}  # fmt: skip


def wheel(folder, name, version, requires=(), files=()):
    """A wheel with nothing in it but `files` and its metadata."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {item}" for item in requires)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        for place, content in dict(files).items():
            archive.writestr(place, content)
        archive.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def pip(python, *words, **environ):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [str(python), "-m", "pip", *words], env=kept | environ, capture_output=True, text=True, timeout=120
    )


def version_in(python, name):
    program = f"import importlib.metadata as found; print(found.version({name!r}))"
    return subprocess.run([str(python), "-c", program], capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A virtual environment with what the image brings, and the folder of wheels that pip sees."""
    root = tmp_path_factory.mktemp("image")
    wheels, own = root / "wheels", root / "own"
    wheels.mkdir()
    own.mkdir()
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    torch_files = {"torch/lib/libtorch_cuda.so": "kernels of the image"}
    for name, version in PINNED.items():
        requires = ["torch"] if name == "speaks_to_torch" else ()
        more = torch_files if name == "torch" else {"triton/__init__.py": ""} if name == "pytorch_triton" else {}
        wheel(own, name, version, requires, more)
    shown = pip(python, "install", "--no-index", "--no-deps", *map(str, sorted(own.iterdir())))
    assert shown.returncode == 0, shown.stderr
    # What the registry would offer: everything that we require, and a torch that fits better.
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(item for part in project["optional-dependencies"].values() for item in part)]
    for item in wanted:
        name, least = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*(?:[><=]=?\s*([\d.]+))?", item).groups()
        if name not in ("torch", "megatron-core", "megatron-ru"):
            wheel(wheels, name.replace("-", "_"), f"{least or '1'}.1".replace("..", "."))
    wheel(wheels, "torch", "2.13.0")
    wheel(wheels, "triton", "9.0")
    wheel(wheels, "megatron_core", "0.19.2", ["torch>=2.6.0", "numpy"])
    wheel(wheels, "needs_new_torch", "1.0", ["torch>=2.9"])
    return python, wheels


@pytest.fixture
def source(tmp_path):
    """Our project as far as pip is concerned, with a backend that needs nothing and a command that tells its words."""
    folder = tmp_path / "source"
    (folder / "launch").mkdir(parents=True)
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    build_system = text[text.index("[build-system]") : text.index("[project]")]
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n\n'
    (folder / "pyproject.toml").write_text(text.replace(build_system, backend))
    requires = tomllib.loads(text)["project"]["dependencies"]
    told = tmp_path / "told"
    command = f"import sys\nopen({str(told)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    (folder / "backend.py").write_text(
        "import pathlib\n"
        "from tests_wheel import wheel\n"
        "def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
        f"    made = wheel(pathlib.Path(folder), 'megatron_ru', '0.1.0', {requires!r},\n"
        f"                 {{'megatron_ru/__main__.py': {command!r}}})\n"
        "    return made.name\n"
    )
    helper = Path(__file__).read_text(encoding="utf-8")
    function = re.search(r"(?s)\ndef wheel\(.*?\n    return path\n", helper)[0]
    (folder / "tests_wheel.py").write_text(f"import zipfile\n{function}")
    return folder, told


def install(image, source, **environ):
    python, wheels = image
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environ = kept | {"PYTHON": str(python), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)} | environ
    program = ["bash", str(FOLDER / "install.sh"), str(source)]
    return subprocess.run(program, env=environ, capture_output=True, text=True, timeout=200)


def test_without_these_steps_pip_replaces_torch(image, source, tmp_path):
    """What the rest of this file is about."""
    python, wheels = image
    words = ["--no-index", "--find-links", str(wheels), "--dry-run", "--ignore-installed", "--no-deps", "torch>=2.8"]
    assert "Would install torch-2.13.0" in pip(python, "install", *words).stdout
    shown = pip(python, "install", "--no-index", "--find-links", str(wheels), "--dry-run", str(source[0]))
    assert "torch-2.13.0" in shown.stdout.splitlines()[-1], shown.stderr


def test_install_leaves_torch_and_brings_everything_else(image, source):
    folder, told = source
    shown = install(image, folder)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert {name: version_in(image[0], name) for name in PINNED} == PINNED
    assert version_in(image[0], "megatron-core") == "0.19.2"
    assert version_in(image[0], "megatron-ru") == "0.1.0"
    assert version_in(image[0], "triton") == "", "the image has it under another name"
    for name in ("numpy", "pydantic", "sentencepiece", "mpi4py", "transformers"):
        assert version_in(image[0], name) != "", name
    # The ops are compiled in the image, and the last word is the doctor's.
    assert told.read_text().splitlines() == ["build --kind cuda", "doctor"]
    assert f"torch and {len(PINNED) - 1} packages bound to it are as the image brought them" in shown.stdout


def test_constraints_refuse_what_would_replace_torch(image, tmp_path):
    python, wheels = image
    program = [str(python), str(FOLDER / "image_torch.py"), "constraints"]
    constraints = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert dict(line.split("==") for line in constraints.splitlines()) == {
        name.replace("_", "-"): version for name, version in PINNED.items()
    }
    (tmp_path / "constraints.txt").write_text(constraints)
    for words in (["needs_new_torch"], ["torch>=2.8"], ["--upgrade", "torch"]):
        kept = pip(python, "install", "--no-index", "--find-links", str(wheels), *words,
                   PIP_CONSTRAINT=str(tmp_path / "constraints.txt"))  # fmt: skip
        assert version_in(python, "torch") == IMAGE_TORCH
        # Nothing to do for an upgrade of what is pinned; the others are conflicts.
        assert (kept.returncode == 0) == ("--upgrade" in words), kept.stdout + kept.stderr


def test_a_torch_that_changed_fails_the_build(image, source, tmp_path):
    """Even in the same version: another build of it, by a package that pip was made to install."""
    python, _ = image
    program = [str(python), str(FOLDER / "image_torch.py")]
    before = tmp_path / "before"
    before.write_text(subprocess.run([*program, "fingerprint"], capture_output=True, text=True, check=True).stdout)
    assert subprocess.run([*program, "check", str(before)]).returncode == 0
    (library,) = (python.parents[1]).rglob("libtorch_cuda.so")
    state = library.stat()
    os.utime(library, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    try:
        shown = subprocess.run([*program, "check", str(before)], capture_output=True, text=True)
    finally:
        os.utime(library, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shown.returncode == 1
    assert "image_torch: the image's own is no longer here: " in shown.stderr
    assert "torch/__init__.py" in shown.stderr


def test_an_image_without_torch_is_refused(tmp_path):
    venv.create(tmp_path / "venv")
    program = [str(tmp_path / "venv/bin/python"), str(FOLDER / "image_torch.py"), "constraints"]
    shown = subprocess.run(program, capture_output=True, text=True)
    assert shown.returncode == 1
    assert "this image has no torch" in shown.stderr


def test_images_own_constraints_hold_too(image, source, tmp_path):
    (tmp_path / "image.txt").write_text("numpy==1.0\n")
    shown = install(image, source[0], PIP_CONSTRAINT=str(tmp_path / "image.txt"))
    assert shown.returncode != 0
    assert "numpy" in shown.stdout + shown.stderr


def instructions(text):
    """(word, rest) of a Dockerfile, continued lines joined, comments gone."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


DOCKERFILE = instructions((FOLDER / "Dockerfile").read_text(encoding="utf-8"))
DEFINITION = (FOLDER / "megatron_ru.def").read_text(encoding="utf-8")


def section(name):
    return textwrap.dedent(re.search(rf"(?ms)^%{name}\n(.*?)(?=^%|\Z)", DEFINITION)[1]).strip().splitlines()


def test_images_are_nvidias_and_all_the_same():
    jobs = (PROJECT / "launch" / "jobs" / "slurm_container.sh").read_text(encoding="utf-8")
    image = re.search(r"nvcr\.io#(nvidia/pytorch:[\w.-]+)", jobs)[1]
    assert dict(DOCKERFILE)["FROM"] == "${IMAGE}"
    assert ("ARG", f"IMAGE=nvcr.io/{image}") in DOCKERFILE
    assert f"\nFrom: nvcr.io/{image}\n" in DEFINITION


def test_only_install_sh_installs():
    runs = [rest for word, rest in DOCKERFILE if word == "RUN"]
    assert runs == ["bash /opt/megatron_ru/launch/containers/install.sh /opt/megatron_ru"]
    assert section("post") == runs
    assert {word for word, _ in DOCKERFILE} == {"ARG", "FROM", "COPY", "RUN", "WORKDIR"}


def test_every_pip_install_is_constrained_or_without_dependencies():
    lines = (FOLDER / "install.sh").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if not line.lstrip().startswith("#")]
    constrained, installs = False, []
    for line in code:
        constrained = (constrained or line.startswith("export PIP_CONSTRAINT=")) and line != "unset PIP_CONSTRAINT"
        if " -m pip install" in line:
            installs.append(line)
            assert constrained or "--no-deps" in line, line
            assert not re.search(r"--(upgrade|force-reinstall|ignore-installed)|-U\b|\btorch\b", line), line
        assert not re.search(r"\bpip\b", line) or " -m pip install" in line or "PIP_" in line or "/etc/pip/" in line, (
            line
        )
    assert len(installs) == 3
    order = [line for line in code if "image_torch.py" in line]
    assert " fingerprint >" in order[0]
    assert " check " in order[-1]
    assert code.index(order[-1]) > code.index(installs[-1])


def copied():
    for word, rest in DOCKERFILE:
        if word == "COPY":
            *sources, target = rest.split()
            yield from ((source, target) for source in sources)


def test_what_is_copied_exists_and_both_recipes_copy_the_same():
    for source, target in copied():
        assert (PROJECT / source).exists(), source
        assert target.startswith("/opt/megatron_ru/")
    files = dict(line.split() for line in section("files"))
    assert sorted(files) == sorted(source for source, _ in copied())
    assert all(target == f"/opt/megatron_ru/{source}" for source, target in files.items())


def test_what_the_package_is_built_of_is_copied():
    sources = {source for source, _ in copied()}
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {
        "pyproject.toml",
        "setup.py",
        "csrc",
        "megatron_ru",
        project["readme"],
        *project["license-files"],
    } <= sources


def ignored(path, rules):
    """Docker's reading: the last rule that fits a path or a folder above it decides."""
    parts = Path(path).parts
    above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    state = False
    for rule in rules:
        pattern, keep = rule.removeprefix("!"), rule.startswith("!")
        deep = pattern.removeprefix("**/")
        fits = any(
            fnmatch.fnmatchcase(place.rpartition("/")[2] if deep != pattern else place, deep)
            and (deep != pattern or place.count("/") == pattern.count("/"))
            for place in above
        )
        if fits:
            state = not keep
    return state


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("data/ru.bin", True),
        (".venv/bin/python", True),
        (".git/config", True),
        ("tests/docs/test_containers.py", True),
        ("megatron_ru/__pycache__/x.pyc", True),
        ("megatron_ru/ops/_compiled/ops.so", True),
        ("megatron_ru/ops/rope.py", False),
        ("csrc/include/device.cuh", False),
    ],
)
def test_dockerignore(path, left_out):
    text = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert ignored(path, rules) is left_out
    assert [source for source, _ in copied() if ignored(source, rules)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound_bash(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("no shellcheck beside this Python")
    shown = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout


@pytest.fixture
def enroot(tmp_path):
    """enroot_import.sh with a stand-in for enroot."""
    program = tmp_path / "bin" / "enroot"
    program.parent.mkdir()
    program.write_text('#!/bin/bash\necho "$@"\n[ -z "${FAIL:-}" ] || { touch "$3"; exit 1; }\necho image >"$3"\n')
    program.chmod(0o755)

    def run(*words, **environ):
        environ = {"PATH": f"{program.parent}:/usr/bin:/bin", **environ}
        script = ["bash", str(FOLDER / "enroot_import.sh"), *words]
        return subprocess.run(script, cwd=tmp_path, env=environ, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("image", "uri"),
    [
        ("megatron_ru", "dockerd://megatron_ru"),
        ("team/megatron_ru:1", "dockerd://team/megatron_ru:1"),
        ("nvcr.io/nvidia/pytorch:25.06-py3", "docker://nvcr.io#nvidia/pytorch:25.06-py3"),
        ("registry:5000/team/x", "docker://registry:5000#team/x"),
    ],
)
def test_enroot_takes_images_of_docker_and_of_registries(enroot, tmp_path, image, uri):
    shown = enroot(image, "made.sqsh")
    assert (shown.returncode, shown.stdout) == (0, f"import --output made.sqsh.partial {uri}\n"), shown.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "made.sqsh"]


def test_enroot_that_fails_leaves_nothing(enroot, tmp_path):
    assert enroot("megatron_ru", "made.sqsh", FAIL="1").returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_enroot_overwrites_nothing(enroot, tmp_path):
    (tmp_path / "made.sqsh").write_text("mine")
    shown = enroot("megatron_ru", "made.sqsh")
    assert (shown.returncode, shown.stderr) == (2, "enroot_import: made.sqsh exists: remove it or name another file\n")
    assert "no enroot on PATH" in enroot("megatron_ru", "other.sqsh", PATH="/usr/bin:/bin").stderr
