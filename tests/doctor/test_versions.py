"""Which versions fit, and what is said of those that do not."""

import pytest

from megatron_ru.doctor import versions

RANGES = {"torch": ">=2.8", "megatron-core": "<0.21,>=0.19", "numpy": ">=1.26", "mpi4py": ">=4"}
GOOD = {"torch": "2.13.0", "megatron-core": "0.19.2", "numpy": "2.1.0"}


@pytest.mark.parametrize(
    ("version", "supported", "fits"),
    [
        ("2.13.0+cu130", ">=2.8", True),
        ("2.7.1", ">=2.8", False),
        # NVIDIA's images: before 2.8 in PEP 440, and the 2.8 of that image.
        ("2.8.0a0+5228986c39.nv25.6", ">=2.8", True),
        ("2.7.0a0+79aa17489c.nv25.4", ">=2.8", False),
        ("0.20.1rc2", "<0.21,>=0.19", True),
        ("0.21.0rc0", "<0.21,>=0.19", False),
        ("0.18.9", "<0.21,>=0.19", False),
        ("7", "", True),
    ],
)
def test_in_range(version, supported, fits):
    assert versions.in_range(version, supported) is fits


@pytest.mark.parametrize(
    ("change", "subject", "verdict", "detail"),
    [
        ({}, "torch", "ok", "2.13.0, supported >=2.8"),
        ({"torch": None}, "torch", "broken", "not installed: pip install 'torch>=2.8'"),
        ({"torch": "2.7.1"}, "torch", "broken",
         "torch 2.7.1 is outside the supported >=2.8: pip install 'torch>=2.8'"),
        ({"megatron-core": None}, "megatron-core", "broken",
         "not installed: pip install 'megatron-core<0.21,>=0.19'"),
        ({}, "packages", "ok", "1 others that every run imports"),
        ({"numpy": None}, "packages", "broken", "numpy is not installed: pip install megatron-ru"),
        ({"numpy": "1.20"}, "packages", "broken", "numpy 1.20 is outside >=1.26: pip install megatron-ru"),
    ],
)  # fmt: skip
def test_core(change, subject, verdict, detail):
    found = {finding.subject: finding for finding in versions.core_findings({**GOOD, **change}, RANGES)}
    assert list(found) == ["torch", "megatron-core", "packages"]
    assert (found[subject].verdict, found[subject].detail) == (verdict, detail)


def test_optional_ones_are_absent_or_fit_or_are_broken():
    installed = {"mpi4py": "3.1", "liger-kernel": "0.8.5"}
    found = {finding.subject: finding for finding in versions.optional_findings(installed, RANGES)}
    assert list(found) == list(versions.OPTIONAL)
    assert (found["mpi4py"].verdict, found["mpi4py"].detail) == (
        "broken", "mpi4py 3.1 is outside the supported >=4: pip install 'mpi4py>=4'",
    )  # fmt: skip
    assert (found["liger-kernel"].verdict, found["liger-kernel"].detail) == ("ok", "Liger-Kernel 0.8.5")
    assert found["deepspeed"].verdict == "absent"


@pytest.mark.parametrize(
    ("version", "extensions", "said"), [(None, False, False), ("0.1", True, False), ("0.9.10.dev0", False, True)]
)
def test_apex_without_extensions_is_told(version, extensions, said):
    finding = versions.apex_finding(version, extensions)
    assert (finding is not None) is said
    if finding is not None:
        assert finding.verdict == "slow"
        assert "pip uninstall apex" in finding.detail


def test_ranges_are_those_of_our_metadata():
    """One source: pyproject.toml."""
    ranges = versions.supported_ranges()
    assert set(ranges["megatron-core"].split(",")) == {">=0.19", "<0.21"}
    assert ranges["torch"] == ">=2.8"
    assert ranges["mpi4py"] == ">=4"
    assert set(ranges["deepspeed"].split(",")) == {">=0.19", "<0.20"}
    assert "matplotlib" not in ranges
    needed = versions.needed_always()
    assert {"psutil", "six", "sentencepiece"} <= set(needed)
    assert not {"torch", "megatron-core", "mpi4py", "ruff"} & set(needed)
