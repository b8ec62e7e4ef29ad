import pytest
import torch
from torch import Tensor

from megatron_ru.ops.op import BenchmarkCase, Call, Op, Tolerance

TOLERANCE = Tolerance(ulps=1, wide=8, reason="for tests")


def double(x: Tensor) -> Tensor:
    """x · x, whose gradient is 2x."""
    return x * x


def double_reference(x: Tensor) -> Tensor:
    return x.double() ** 2


def make_op(name="square", rows=4, columns=3, **changes):
    """An op of a few numbers, with one case."""

    def make(device, dtype):
        values = torch.arange(1, rows * columns + 1, dtype=torch.float32).reshape(rows, columns) / 7
        return Call(arguments=(values.to(device, dtype).requires_grad_(),))

    def bytes_moved(dtype):
        size = rows * columns * dtype.itemsize
        return 2 * size, 3 * size

    case = BenchmarkCase(label=f"{rows}x{columns}", make=make, bytes_moved=bytes_moved, dtype=torch.float32)
    settings = {
        "name": name, "switch": name, "summary": "x squared", "function": double, "plain": double,
        "reference": double_reference, "samples": (), "cases": (case,), "tolerance": TOLERANCE,
        "gradient_tolerance": TOLERANCE, "plain_tolerance": TOLERANCE, "torch_ops": (),
    }  # fmt: skip
    return Op(**{**settings, **changes})


@pytest.fixture
def square():
    return make_op()
