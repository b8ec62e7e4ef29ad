"""The build: what it chooses, how it names, how it fails, and one small library that is really compiled."""

import ctypes
import multiprocessing
import shutil
from pathlib import Path

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import build
from megatron_ru.ops.build import Nvcc, Torch, parse_archs, plan_build


def torch_of(folder=Path("/nowhere"), cuda="13.0", sees_gpu=False):
    return Torch(version="2.99.0+cu130", cuda=cuda, cxx11_abi=True, folder=folder, sees_gpu=sees_gpu)


@pytest.fixture
def machine(monkeypatch):
    """A machine with g++ and nvcc 13.0, no GPU, and nothing in the environment."""
    for name in ("MEGATRON_RU_BUILD", "MEGATRON_RU_CUDA_ARCHES", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "find_compiler", lambda: "g++")
    set_nvccs(monkeypatch, (13, 0))
    return monkeypatch


def set_nvccs(monkeypatch, *versions):
    found = [Nvcc(path=Path(f"/cuda-{version[0]}/bin/nvcc"), version=version) for version in versions]
    monkeypatch.setattr(build, "find_nvccs", lambda torch: found)


def test_auto_without_a_gpu_builds_cpu_ops(machine):
    plan = plan_build("auto", (), torch_of())
    assert (plan.kind, plan.archs) == ("cpu", ())
    assert "torch sees no GPU here (megatron-ru build --kind cuda" in plan.reason


def test_auto_with_a_gpu_or_architectures_builds_cuda_ops(machine):
    plan = plan_build("auto", (), torch_of(sees_gpu=True))
    assert (plan.kind, plan.archs, plan.reason) == ("cuda", (80, 90), "torch sees a GPU")
    plan = plan_build("auto", (90,), torch_of())
    assert (plan.kind, plan.archs) == ("cuda", (90,))
    machine.setenv("MEGATRON_RU_CUDA_ARCHES", "9.0;8.0")
    assert plan_build("auto", (), torch_of()).archs == (80, 90)


def test_environment_replaces_auto_and_nothing_else(machine):
    machine.setenv("MEGATRON_RU_BUILD", "none")
    assert plan_build("auto", (), torch_of()).kind == "none"
    assert plan_build("cpu", (), torch_of()).kind == "cpu"
    machine.setenv("MEGATRON_RU_BUILD", "gpu")
    with pytest.raises(UserError, match=r"'gpu' is no kind of build .*: expected auto, cpu, cuda, none"):
        plan_build("auto", (), torch_of())


def test_v100_where_nvcc_still_knows_it(machine):
    set_nvccs(machine, (12, 9))
    assert plan_build("cuda", (), torch_of(cuda="12.9")).archs == (70, 80, 90)


def test_nvcc_must_be_of_torch_s_major_version(machine):
    set_nvccs(machine, (12, 9), (13, 1))
    assert plan_build("cuda", (), torch_of()).nvcc.version == (13, 1)
    set_nvccs(machine, (12, 9))
    message = "torch 2.99.0+cu130 is built with CUDA 13.0 and needs an nvcc 13.x; /cuda-12/bin/nvcc is 12.9"
    with pytest.raises(UserError) as error:
        plan_build("cuda", (), torch_of())
    assert str(error.value) == f"the CUDA ops cannot be built: {message}"
    plan = plan_build("auto", (), torch_of(sees_gpu=True))
    assert (plan.kind, plan.reason) == ("cpu", f"CPU ops alone: {message}")


def test_without_compilers(machine):
    set_nvccs(machine)
    assert "no nvcc was found" in plan_build("auto", (), torch_of()).reason
    assert "built without CUDA" in plan_build("auto", (), torch_of(cuda=None)).reason
    machine.setattr(build, "find_compiler", lambda: None)
    plan = plan_build("auto", (), torch_of())
    assert (plan.kind, plan.reason) == ("none", "no C++ compiler was found: apt install g++, or set CXX")
    with pytest.raises(UserError, match=r"the cpu ops cannot be built: no C\+\+ compiler"):
        plan_build("cpu", (), torch_of())


@pytest.mark.parametrize("words", ["80,90", "8.0;9.0", "sm_80 sm_90", " compute_80, 90 "])
def test_architectures_in_the_ways_they_are_written(words):
    assert parse_archs(words) == (80, 90)


def test_architectures_that_are_none():
    assert parse_archs("10.0,120") == (100, 120)
    with pytest.raises(UserError, match="'hopper' is no CUDA architecture: expected numbers such as 80,90"):
        parse_archs("80,hopper")


def test_nvccs_are_found_where_they_may_be(tmp_path, monkeypatch):
    def nvcc(home, version):
        path = tmp_path / home / "bin/nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        path.chmod(0o755)
        return path

    wheel = nvcc("site/nvidia/cu13", "13.2")
    home = nvcc("home", "12.4")
    broken = tmp_path / "broken/bin/nvcc"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "broken"))
    monkeypatch.setenv("PATH", str(home.parent))
    found = [nvcc for nvcc in build.find_nvccs(torch_of(tmp_path / "site/torch")) if tmp_path in nvcc.path.parents]
    assert [(nvcc.path, nvcc.version) for nvcc in found] == [(home, (12, 4)), (wheel, (13, 2))]


def test_name_tells_everything():
    name = build.library_name("2.9.0+cu130", "cuda", (80, 90), "0123456789ab")
    assert name.startswith("megatron_ru_ops-")
    assert name.endswith("-torch2.9.0+cu130-cuda_80_90-0123456789ab.so")


def test_hash_follows_what_goes_into_a_library(tmp_path):
    (tmp_path / "cpu").mkdir()
    for name in ("bindings.cpp", "cpu/a.cpp", "a.h", "a.cu", "README.md"):
        (tmp_path / name).write_text(name)

    def hashes():
        return build.source_hash(tmp_path, "cpu"), build.source_hash(tmp_path, "cuda")

    first = hashes()
    assert first[0] != first[1]
    (tmp_path / "README.md").write_text("changed")
    assert hashes() == first
    (tmp_path / "a.cu").write_text("changed")
    assert hashes()[0] == first[0]
    assert hashes()[1] != first[1]
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    assert hashes()[0] != first[0]


def test_package_that_cannot_be_written_to_leaves_the_cache(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.write_text("a file, where a folder would be made")
    monkeypatch.setattr(build, "output_folders", lambda: (closed / "folder", tmp_path / "cache"))
    assert build.output_folder() == tmp_path / "cache"
    monkeypatch.setattr(build, "output_folders", lambda: (closed / "folder",))
    with pytest.raises(UserError, match=r"the library cannot be written to .*: make one of them writable"):
        build.output_folder()


# The real one asks torch's operators who they are.
TRIAL = "import ctypes, os, torch; ctypes.CDLL({path!r}, os.RTLD_NOW)"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of its own with a library of two files; what is built lies in it."""
    sources = tmp_path / "csrc"
    for folder in ("cpu", "include"):
        (sources / folder).mkdir(parents=True)
    # Without torch's headers it compiles in no time.
    bindings = (
        '#include "include/number.h"\nint answer();\n'
        'extern "C" __attribute__((visibility("default"))) int bound() { return answer(); }\n'
    )
    (sources / "bindings.cpp").write_text(bindings)
    (sources / "include/number.h").write_text("#define NUMBER 42\n")
    (sources / "cpu/answer.cpp").write_text('#include "number.h"\nint answer() { return NUMBER; }\n')
    package = tmp_path / "megatron_ru"
    package.mkdir()
    monkeypatch.setattr(build, "_PACKAGE", package)
    monkeypatch.setattr(build, "_TRIAL", TRIAL)
    return tmp_path


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_builds_once_and_then_only_what_changed(project):
    built = build.build("cpu")
    assert built.compiled == 2
    assert built.path.parent == project / "megatron_ru/ops/_compiled"
    assert ctypes.CDLL(str(built.path)).bound() == 42
    again = build.build("cpu")
    assert (again.path, again.compiled) == (built.path, 0)

    (project / "csrc/cpu/answer.cpp").write_text("int answer() { return 43; }\n")
    changed = build.build("cpu")
    assert changed.compiled == 1
    assert ctypes.CDLL(str(changed.path)).bound() == 43
    # The old library can never be loaded again, so it is gone.
    assert list(built.path.parent.glob("*.so")) == [changed.path]

    (project / "csrc/cpu/answer.cpp").write_text("int answer() { return 43 }\n")
    with pytest.raises(UserError) as error:
        build.build("cpu")
    message = str(error.value)
    assert message.startswith("compiling answer.cpp failed: g++ ended with 1 and said:")
    assert "answer.cpp:1:" in message
    assert " error: expected " in message
    assert list(built.path.parent.glob("*.so*")) == [changed.path]


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_library_that_does_not_load_gets_no_name(project):
    (project / "csrc/cpu/answer.cpp").unlink()
    with pytest.raises(UserError, match=r"loading megatron_ru_ops-.* failed"):
        build.build("cpu")
    assert list((project / "megatron_ru/ops/_compiled").glob("*.so")) == []


def build_in(folder, answers):
    build._PACKAGE = folder / "megatron_ru"
    build._TRIAL = TRIAL
    answers.put(build.build("cpu").compiled)


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_several_ranks_build_once(project):
    shutil.rmtree(project / "build", ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=build_in, args=(project, answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    counts = sorted(answers.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert counts == [0, 2]
