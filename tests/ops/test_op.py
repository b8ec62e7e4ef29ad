"""The record of an op: calls, copies, tolerances."""

import dataclasses

import pytest
import torch

from megatron_ru.ops.op import OPS, Call, Tolerance, random_tensor, ulp


def test_registry_finds_the_ops_by_scanning():
    assert {"rms_norm", "rope", "adamw"} <= set(OPS)
    for name, op in OPS.items():
        assert op.name == name
        assert op.samples
        assert op.cases


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPS["rope"].switch = "other"


def test_call_keeps_order_and_names():
    call = Call(arguments=(2, 3), keywords={"c": 4})
    assert call.run(lambda a, b, c: a * 100 + b * 10 + c) == 234


def test_leaves_are_found_in_lists_and_keywords():
    a, b, c = torch.ones(1, requires_grad=True), torch.ones(2), torch.ones(3, requires_grad=True)
    call = Call(arguments=(a, [b, 1]), keywords={"c": (c,)})
    assert [leaf.numel() for leaf in call.leaves()] == [1, 3]
    assert [tensor.numel() for tensor in call.tensors()] == [1, 2, 3]


def test_copy_keeps_strides_values_and_sharing_but_no_storage():
    base = torch.arange(12.0).reshape(3, 4)
    rows = base[:, :2].detach().requires_grad_()
    expanded = torch.ones(1, 4).expand(3, 4)
    call = Call(arguments=(rows, rows, expanded))
    copy = call.copy()
    first, second, third = copy.arguments
    assert first is second
    assert first.stride() == rows.stride()
    assert third.stride() == expanded.stride()
    assert torch.equal(first, rows)
    assert first.requires_grad
    first.detach().zero_()
    assert rows.sum() != 0


def test_double_changes_floats_only():
    call = Call(arguments=(torch.ones(2, dtype=torch.float16, requires_grad=True), torch.arange(2)))
    wide, whole = call.double().arguments
    assert wide.dtype == torch.float64
    assert wide.requires_grad
    assert whole.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    for value in (1.0, 1.5, 0.75, -3.0, 1000.0, info.smallest_normal, info.smallest_normal / 2, 0.0):
        there = torch.tensor(value, dtype=dtype)
        beyond = torch.nextafter(there, torch.tensor(float("inf"), dtype=dtype))
        expected = (beyond.double() - there.double()).item()
        if value < 0:
            expected = (
                torch.tensor(-value, dtype=dtype).nextafter(torch.tensor(float("inf"), dtype=dtype)).double() + value
            ).item()
        assert ulp(torch.tensor(value, dtype=torch.float64), dtype).item() == expected


def test_tolerance_adds_its_parts():
    exact = torch.tensor([1.0, 8.0], dtype=torch.float64)
    tolerance = Tolerance(ulps=0.5, wide=2, rough=1, reason="")
    bf16, fp32 = 2.0**-7, 2.0**-23
    found = tolerance.allowed(exact, torch.bfloat16)
    assert found.tolist() == pytest.approx([0.5 * bf16 + 2 * fp32 * 8 + 8 * bf16, 4 * bf16 + 2 * fp32 * 8 + 8 * bf16])
    # A result in fp32 of inputs that were rounded to bf16; numbers of size 100 that cancelled.
    found = tolerance.allowed(exact, torch.float32, 100.0, torch.bfloat16)
    assert found.tolist() == pytest.approx([100 * bf16, 100 * bf16], rel=1e-4)


def test_samples_are_the_same_each_time():
    first, second = (random_tensor(5, device="cpu", dtype=torch.float32, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, random_tensor(5, device="cpu", dtype=torch.float32, seed=4))


# Bytes per element in bf16, forward and backward, from the definition of each op.
BYTES = {
    "rms_norm": ("8192x4096", 8192 * 4096, 4, 6),
    "add_rms_norm": ("8192x4096", 8192 * 4096, 8, 8),
    "layer_norm": ("8192x2560", 8192 * 2560, 4, 6),
    "add_layer_norm": ("16384x8192", 16384 * 8192, 8, 8),
    "rope": ("4096x2x(32+8)x128", 4096 * 2 * 40 * 128, 4, 4),
    "activation": ("swiglu 8192x14336", 8192 * 14336, 6, 10),
    "glu": ("swiglu 8192x14336", 8192 * 14336, 6, 10),
    "cross_entropy": ("8192x40000", 8192 * 40000, 4, 0),
    "vocab_parallel_cross_entropy": ("8192x128256", 8192 * 128256, 2, 4),
}


@pytest.mark.parametrize("name", BYTES)
def test_cases_state_the_fewest_bytes(name):
    label, elements, forward, backward = BYTES[name]
    (case,) = (case for case in OPS[name].cases if case.label == label)
    assert case.bytes_moved(torch.bfloat16) == (forward * elements, backward * elements)


def test_cases_of_ops_that_work_in_place_state_their_bytes():
    parameters = 256 * 2**20
    for case in OPS["adamw"].cases:
        assert case.bytes_moved(case.dtype) == (28 * parameters, 0)
    for case in OPS["gradient_guard"].cases:
        assert case.bytes_moved(torch.float32) == (4 * parameters, 0)
