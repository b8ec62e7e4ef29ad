"""`megatron-ru doctor`: a verdict for each thing, of this machine and of machines that lack something."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ru.commands import doctor
from megatron_ru.commands.main import main
from megatron_ru.ops import backend, build, library


def findings(capsys):
    assert main(["doctor", "--json"]) == 0
    return {item["subject"]: item for item in json.loads(capsys.readouterr().out)}


def test_this_machine(capsys):
    found = findings(capsys)
    assert found["torch"]["detail"].startswith(torch.__version__)
    assert found["torch"]["verdict"] == "ok"
    assert found["megatron-core"]["verdict"] == "ok"
    assert {name for name in found if name.startswith("op ")} == {f"op {name}" for name in backend.known()}
    loaded = backend.library_status().path is not None
    assert found["ops"]["verdict"] == ("ok" if loaded else "missing")
    expected = "cpu fused" if loaded else "plain torch, without compiled ops"
    assert found["op rope"]["detail"].startswith(expected)
    assert {item["verdict"] for item in found.values()} <= {"ok", "missing", "absent"}


def test_table_has_a_line_for_each(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(shown) == len(found)
    for line, item in zip(shown, found, strict=True):
        assert line.split() == f"{item['subject']} {item['verdict']} {item['detail']}".split()


def test_machine_without_compilers_and_library(capsys, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "find_nvccs", lambda torch: [])
    monkeypatch.setattr(backend, "_LIBRARY", library.LibraryStatus(path=None, reason="none has been built"))
    found = findings(capsys)
    assert found["c++ compiler"]["verdict"] == "missing"
    assert "apt install g++" in found["c++ compiler"]["detail"]
    assert found["nvcc"]["verdict"] == ("missing" if torch.cuda.is_available() else "absent")
    assert found["ops"] == {"subject": "ops", "verdict": "missing", "detail": "no compiled ops: none has been built"}
    assert found["op adamw"]["detail"] == "plain torch, without compiled ops"


def test_nvcc_of_another_major_version(capsys, monkeypatch):
    nvcc = build.Nvcc(path=Path("/cuda/bin/nvcc"), version=(11, 8))
    monkeypatch.setattr(build, "find_nvccs", lambda torch: [nvcc])
    found = findings(capsys)["nvcc"]
    assert found["verdict"] == "missing"
    assert found["detail"] == f"/cuda/bin/nvcc, CUDA 11.8: torch needs CUDA {torch.version.cuda}, another major version"


def test_switched_off_op_says_so(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_LIBRARY", library.LibraryStatus(path=Path("ops.so"), reason="found"))
    with backend.only("rope"):
        found = findings(capsys)
    assert found["op rope"]["verdict"] == "ok"
    assert found["op adamw"]["detail"].startswith("cpu plain torch: switched off by --ru-ops")


def test_without_torch_it_ends_there(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    found = findings(capsys)
    assert found.keys() == {"python", "torch"}
    assert found["torch"]["detail"] == "not installed: pip install torch"


@pytest.mark.parametrize("peer", ["liger-kernel", "apex", "transformer-engine"])
def test_peers_are_optional(capsys, peer):
    assert findings(capsys)[peer]["verdict"] in ("ok", "absent")
