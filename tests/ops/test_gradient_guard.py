"""The gradient guard: what becomes zero, what stays, and what it counts."""

import pytest
import torch

from megatron_ru.ops import backend
from megatron_ru.ops.gradient_guard import zero_nonfinite


@pytest.fixture(autouse=True, params=["all", "none"])
def _both_forms(request):
    with backend.only(request.param):
        yield


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 8, 70_000])
def test_one_bad_number_makes_its_tensor_zero(bad, dtype, place):
    tensors = [torch.ones(70_001, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)]
    tensors[0][place] = bad
    assert zero_nonfinite(tensors).tolist() == [1, 0]
    assert not tensors[0].any()
    assert tensors[1].tolist() == [2.0] * 3


def test_largest_numbers_are_numbers():
    tensors = [torch.full((1000,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    for tensor in tensors:
        assert zero_nonfinite([tensor]).tolist() == [0]
        assert tensor.min() == torch.finfo(tensor.dtype).max


def test_dtypes_may_be_mixed():
    tensors = [torch.ones(5), torch.ones(5).half(), torch.ones(5).bfloat16(), torch.ones(5)]
    tensors[2][1] = float("nan")
    assert zero_nonfinite(tensors).tolist() == [0, 0, 1, 0]


def test_flags_are_int32_one_for_each():
    assert zero_nonfinite([]).shape == (0,)
    flags = zero_nonfinite([torch.ones(0), torch.ones(2)])
    assert flags.dtype == torch.int32
    assert flags.tolist() == [0, 0]


def test_parts_with_gaps_are_guarded_too():
    base = torch.ones(4, 4)
    part = base[:, 1]
    part[2] = float("nan")
    assert zero_nonfinite([part]).tolist() == [1]
    assert base.sum() == 12


def test_leaf_that_asks_for_gradients():
    parameter = torch.tensor([1.0, float("inf")], requires_grad=True)
    assert zero_nonfinite([parameter]).tolist() == [1]
    assert not parameter.any()
