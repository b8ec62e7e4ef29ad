import json

import pytest
import torch

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.step_flops import Shape
from megatron_ru.plugin.kernel_causes import COPIES, GEMM
from megatron_ru.plugin.kernel_trace import Kernel, by_cause
from megatron_ru.plugin.step_measurement import StepMeasurement, rates, traced_steps, write_document

SHAPE = Shape(layers=1, hidden=8, ffn=16, heads=2, kv_heads=1, head_size=4, gated=True, vocabulary=32, sequence=4)


def test_steps_to_trace():
    assert traced_steps(None) == range(8, 11)
    assert traced_steps("3:3") == range(3, 4)
    for words in ("3", "0:4", "5:4", "a:b", "-1:4"):
        with pytest.raises(UserError, match="expected FIRST:LAST"):
            traced_steps(words)


def test_kernels_of_the_traced_steps_alone_and_by_part(tmp_path):
    measurement = StepMeasurement("cpu", range(3, 5))
    x = torch.randn(16, 16)
    for _ in range(5):
        measurement.begin()
        x @ x
        x @ x
        measurement.between()
        x.clone()
        measurement.end()
    measurement.close()
    calls = {(kernel.name, kernel.in_update): kernel.calls for kernel in measurement.kernels}
    # Of a mean step, though five have run and two were traced.
    assert calls["aten::mm", False] == 2
    assert calls["aten::clone", True] == 1
    assert ("aten::clone", False) not in calls
    document = measurement.document(SHAPE, tokens=8, gpus=1)
    assert document["traced_steps"] == "3:4"
    assert {(one["cause"], one["part"]) for one in document["causes"]} >= {
        (GEMM, "forward and backward"), (COPIES, "update"),
    }  # fmt: skip
    assert document["flops_per_step"] == SHAPE.flops_per_token * 8
    assert document["timed_steps"] == 2
    write_document(tmp_path / "profile.json", document)
    assert json.loads((tmp_path / "profile.json").read_text())["kernels"][0]["microseconds"] > 0


def test_a_run_that_ends_inside_the_trace_has_its_kernels():
    measurement = StepMeasurement("cpu", range(2, 100))
    for _ in range(3):
        measurement.begin()
        torch.ones(4) + 1
        measurement.between()
        measurement.end()
    measurement.close()
    assert {kernel.name: kernel.calls for kernel in measurement.kernels}["aten::add"] == 1


def test_sums_by_cause():
    kernels = [
        Kernel(name="gemm a", in_update=False, microseconds=3.0, calls=1),
        Kernel(name="gemm b", in_update=False, microseconds=4.0, calls=2),
        Kernel(name="Memcpy", in_update=True, microseconds=5.0, calls=1),
    ]
    assert by_cause(kernels) == [
        {"cause": GEMM, "part": "forward and backward", "microseconds": 7.0, "calls": 3},
        {"cause": COPIES, "part": "update", "microseconds": 5.0, "calls": 1},
    ]


def test_rates():
    found = rates({"step_seconds": 2.0, "forward_backward_seconds": 1.0}, SHAPE, tokens=100, gpus=2, peak=1e-6)
    flops = 100 * SHAPE.flops_per_token
    assert found["tokens_per_second"] == 50
    assert found["forward_backward_tokens_per_second"] == 100
    assert found["tflop_s_per_gpu"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert found["mfu"] == pytest.approx(flops / (2 * 2 * 1e6))
    assert found["forward_backward_mfu"] == pytest.approx(2 * found["mfu"])
    assert rates({"step_seconds": 2.0}, None, 100, 1, None) == {"peak_tflop_s": None, "tokens_per_second": 50}
