"""nvidia-smi's answers, from drivers old and new, healthy and not."""

import pytest

from megatron_ru.doctor import gpus
from megatron_ru.doctor.gpus import Gpu, GpuTrouble, gpu_findings, read_gpus

# Answers --query-gpu=FIELDS and --query-remapped-rows=FIELDS for two GPUs from a table; a field that is not in it, or
# that the other query knows, is not known to this driver.
PROGRAM = r"""#!/bin/bash
declare -A first=({first}) second=({second})
fields=${{1#*=}}
case $1 in
    --query-gpu=*remapped* | --query-remapped-rows=*[!a-z_.,]* | --query-remapped-rows=*gpu*) fields=unknown ;;
esac
for row in first second; do
    declare -n values=$row
    line=()
    for field in ${{fields//,/ }}; do
        if [ -z "${{values[$field]+set}}" ]; then
            echo "Field \"$field\" is not a valid field to query."
            exit 2
        fi
        line+=("${{values[$field]}}")
    done
    (IFS=,; echo "${{line[*]}}")
done
"""
HEALTHY = {
    "index": "0", "name": " NVIDIA H100 80GB HBM3", "memory.total": " 81559", "driver_version": " 580.159",
    "temperature.gpu": " 34", "ecc.errors.uncorrected.volatile.total": " 0", "retired_pages.pending": " [N/A]",
    "remapped_rows.pending": " No", "remapped_rows.failure": " No",
    "clocks_event_reasons.hw_slowdown": " Not Active", "clocks_event_reasons.hw_thermal_slowdown": " Not Active",
    "clocks_event_reasons.sw_thermal_slowdown": " Not Active",
    "clocks_event_reasons.hw_power_brake_slowdown": " Not Active",
}  # fmt: skip


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Installs one that answers for a healthy GPU and for one with changes."""

    def install(changes=(), unknown=(), rename=lambda field: field, script=None):
        def table(row):
            kept = {rename(field): value for field, value in row.items() if field not in unknown}
            return " ".join(f'["{field}"]="{value}"' for field, value in kept.items())

        program = tmp_path / "nvidia-smi"
        second = {**HEALTHY, "index": "1", **dict(changes)}
        program.write_text(script or PROGRAM.format(first=table(HEALTHY), second=table(second)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_healthy_gpus(nvidia_smi):
    nvidia_smi()
    found = read_gpus()
    assert found[0] == Gpu(
        index=0, name="NVIDIA H100 80GB HBM3", memory_mib=81559, driver="580.159", celsius=34, uncorrected_errors=0
    )
    assert [finding.subject for finding in gpu_findings(found)] == ["gpu 0", "gpu 1"]
    assert {finding.verdict for finding in gpu_findings(found)} == {"ok"}
    assert next(gpu_findings(found)).detail == "NVIDIA H100 80GB HBM3, 80 GiB, driver 580.159"


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"remapped_rows.failure": " Yes"}, "broken", "the GPU has to be replaced"),
        ({"ecc.errors.uncorrected.volatile.total": " 3"}, "broken", "3 uncorrected memory errors"),
        ({"clocks_event_reasons.hw_thermal_slowdown": " Active", "temperature.gpu": " 91"}, "slow",
         "clocks are held down by hw thermal slowdown at 91 C"),
        ({"clocks_event_reasons.hw_power_brake_slowdown": " Active"}, "slow", "hw power brake slowdown"),
        ({"remapped_rows.pending": " Yes"}, "slow", "nvidia-smi --gpu-reset"),
        ({"retired_pages.pending": " Yes"}, "slow", "bad memory waits to be mapped out"),
        ({"ecc.errors.uncorrected.volatile.total": " [N/A]", "memory.total": " [N/A]"}, "ok", "HBM3, driver 580.159"),
    ],
)  # fmt: skip
def test_verdicts(nvidia_smi, changes, verdict, words):
    nvidia_smi(changes)
    first, second = gpu_findings(read_gpus())
    assert first.verdict == "ok"
    assert second.verdict == verdict
    assert words in second.detail


def test_older_driver_calls_the_reasons_otherwise(nvidia_smi):
    nvidia_smi(
        {"clocks_event_reasons.hw_slowdown": " Active"},
        rename=lambda field: field.replace("clocks_event_reasons", "clocks_throttle_reasons"),
    )
    assert [gpu.held_down_by for gpu in read_gpus()] == [(), ("hw slowdown",)]


def test_fields_that_a_driver_does_not_know_are_left_out(nvidia_smi):
    nvidia_smi({"ecc.errors.uncorrected.volatile.total": " 2"}, unknown=("remapped_rows.failure",))
    found = read_gpus()
    assert [(gpu.uncorrected_errors, gpu.repair_failed) for gpu in found] == [(0, False), (2, False)]


def test_none_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus() is None


def test_a_driver_that_does_not_answer(nvidia_smi, monkeypatch):
    monkeypatch.setattr(gpus, "_SECONDS", 0.3)
    nvidia_smi(script="#!/bin/bash\nexec sleep 60\n")
    with pytest.raises(GpuTrouble, match="did not answer within 0 s: a GPU has likely fallen off the bus"):
        read_gpus()


def test_a_driver_that_fails(nvidia_smi):
    nvidia_smi(script='#!/bin/bash\necho "NVIDIA-SMI has failed because it couldn\'t communicate"\nexit 9\n')
    with pytest.raises(
        GpuTrouble, match=r"failed with code 9 \(NVIDIA-SMI has failed because it couldn't communicate\)"
    ):
        read_gpus()
