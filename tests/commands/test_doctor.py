"""`megatron-ru doctor`: a verdict for each thing, of this machine and of machines that lack something."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ru.commands.main import main
from megatron_ru.doctor import gpus, machine, versions
from megatron_ru.ops import backend, build, library


def findings(capsys, code=0):
    assert main(["doctor", "--json"]) == code
    return {item["subject"]: item for item in json.loads(capsys.readouterr().out)}


def test_this_machine(capsys):
    found = findings(capsys)
    assert found["torch"]["detail"].startswith(versions.version_of("torch"))
    assert found["torch"]["verdict"] == "ok"
    assert found["megatron-core"]["verdict"] == "ok"
    assert found["packages"]["verdict"] == "ok"
    assert {name for name in found if name.startswith("op ")} == {f"op {name}" for name in backend.known()}
    loaded = backend.library_status().path is not None
    assert found["ops"]["verdict"] == ("ok" if loaded else "slow")
    expected = "cpu fused" if loaded else "plain torch, without compiled ops"
    assert found["op rope"]["detail"].startswith(expected)
    assert found["op rope"]["verdict"] == ("ok" if loaded else "slow")
    assert {item["verdict"] for item in found.values()} <= {"ok", "slow", "absent"}


def test_table_has_a_line_for_each(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(shown) == len(found)
    for line, item in zip(shown, found, strict=True):
        assert line.split() == f"{item['subject']} {item['verdict']} {item['detail']}".split()


def test_json_goes_to_a_file_beside_the_table(capsys, tmp_path):
    path = tmp_path / "deep" / "report.json"
    assert main(["doctor", "--json", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [item["subject"] for item in json.loads(path.read_text())] == [line.split("  ")[0] for line in shown]


def test_machine_without_compilers_and_library(capsys, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "find_nvccs", lambda torch: [])
    monkeypatch.setattr(backend, "_LIBRARY", library.LibraryStatus(path=None, reason="none has been built"))
    found = findings(capsys)
    assert found["c++ compiler"]["verdict"] == "slow"
    assert "apt install g++" in found["c++ compiler"]["detail"]
    assert found["nvcc"]["verdict"] == ("slow" if torch.cuda.is_available() else "absent")
    assert (found["ops"]["verdict"], found["ops"]["detail"]) == ("slow", "no compiled ops: none has been built")
    assert found["op adamw"]["detail"] == "plain torch, without compiled ops"
    assert main(["doctor", "--strict"]) == 1


def test_who_has_the_library_needs_no_compiler(capsys, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(backend, "_LIBRARY", library.LibraryStatus(path=Path("ops.so"), reason="found"))
    assert findings(capsys)["c++ compiler"]["verdict"] == "absent"


def test_nvcc_of_another_major_version(capsys, monkeypatch):
    nvcc = build.Nvcc(path=Path("/cuda/bin/nvcc"), version=(11, 8))
    monkeypatch.setattr(build, "find_nvccs", lambda torch: [nvcc])
    found = findings(capsys)["nvcc"]
    assert found["verdict"] == "absent"
    assert found["detail"] == f"/cuda/bin/nvcc, CUDA 11.8: torch needs CUDA {torch.version.cuda}, another major version"


def test_switched_off_op_says_so(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_LIBRARY", library.LibraryStatus(path=Path("ops.so"), reason="found"))
    with backend.only("rope"):
        found = findings(capsys)
    assert found["op rope"]["verdict"] == "ok"
    assert found["op adamw"]["detail"].startswith("cpu plain torch: switched off by --ru-ops")


def test_without_torch_it_ends_there_and_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(versions, "version_of", lambda distribution: None)
    found = findings(capsys, code=1)
    assert found.keys() == {"python", "torch", "megatron-core", "packages"}
    assert found["torch"]["detail"] == "not installed: pip install 'torch>=2.8'"
    assert found["packages"]["verdict"] == "broken"


def test_version_outside_the_range_is_broken(capsys, monkeypatch):
    installed = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda name: "0.18.0" if name == "megatron-core" else installed(name))
    found = findings(capsys, code=1)
    assert found["megatron-core"]["verdict"] == "broken"
    assert found["torch"]["verdict"] == "ok"


def test_gpus_of_the_driver_that_torch_does_not_see_are_broken(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "read_gpus", lambda: [gpus.Gpu(index=0, name="NVIDIA H100", memory_mib=81559)])
    found = findings(capsys, code=1)
    assert found["gpu 0"]["verdict"] == "ok"
    assert found["gpu"]["detail"].startswith(f"the driver sees 1, torch {torch.__version__} none: install the build")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert findings(capsys)["gpu"] == {
        "subject": "gpu", "verdict": "absent", "detail": "CUDA_VISIBLE_DEVICES hides all from torch", "values": {},
        "listed": True,
    }  # fmt: skip


def test_driver_that_fails_is_broken(capsys, monkeypatch):
    def fail():
        raise gpus.GpuTrouble("nvidia-smi failed with code 9")

    monkeypatch.setattr(machine, "read_gpus", fail)
    assert findings(capsys, code=1)["nvidia-smi"]["detail"] == "nvidia-smi failed with code 9"


@pytest.mark.parametrize("peer", ["liger-kernel", "apex", "transformer-engine"])
def test_peers_are_optional(capsys, peer):
    assert findings(capsys)[peer]["verdict"] in ("ok", "absent")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "no/such/file"], "is neither a file nor a list of hosts"),
        (["--nodes", "auto", "--timeout", "0"], "--timeout 0 leaves no time to answer"),
        (["--nodes", "auto", "--timeout", "nan"], "--timeout nan leaves no time to answer"),
    ],
)
def test_bad_input_is_two(capsys, words, message):
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_options_go_on_to_the_ranks(monkeypatch, tmp_path):
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "megatron_ru.doctor.start.start_over", lambda hosts, gpus, words, limit: started.append((hosts, gpus, words))
    )
    words = ["--gpus-per-node", "8", "--json", "report.json", "--folder", "runs", "--timeout", "30", "--strict"]
    assert main(["doctor", "--nodes", "gpu1,gpu2", *words]) == 0
    assert started == [
        (["gpu1", "gpu2"], 8,
         ["--folder", f"{tmp_path}/runs", "--timeout", "30", "--json", f"{tmp_path}/report.json", "--strict"]),
    ]  # fmt: skip


def test_ranks_on_named_hosts_are_as_many_as_gpus_here(monkeypatch):
    started = []
    monkeypatch.setattr("megatron_ru.doctor.start.start_over", lambda hosts, gpus, *rest: started.append(gpus))
    for found in (None, [], [gpus.Gpu(index=index, name="H100") for index in range(4)]):
        monkeypatch.setattr(gpus, "read_gpus", lambda found=found: found)
        main(["doctor", "--nodes", "gpu1"])
    assert started == [1, 1, 4]
