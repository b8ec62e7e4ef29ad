"""Gradients that are written where they would be added to zeros."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron_ru.ops.weight_gradient import add_weight_gradient
from megatron_ru.plugin.first_gradients import (
    _settle_before,
    _settle_before_autograd,
    _zero_the_rest,
    first_gradient_seams,
)

ROWS, COLUMNS = 3, 4
SIZE = ROWS * COLUMNS


class Buffer:
    """What Megatron's gradient buffer has: parameters with pads between them, and one of them in its own memory."""

    def __init__(self, count=4):
        self.grad_data = torch.zeros(count * (SIZE + 2))
        self.params = [torch.nn.Parameter(torch.zeros(ROWS, COLUMNS)) for _ in range(count)]
        self.param_index_map, self.extra_main_grads, self.resets = {}, [], 0
        for number, parameter in enumerate(self.params):
            start = number * (SIZE + 2) + 1
            self.param_index_map[parameter] = (start, start + SIZE, 0)
            parameter.main_grad = self.grad_data[start : start + SIZE].view(ROWS, COLUMNS)
        self.buckets = [SimpleNamespace(params_list=self.params)]

    def reset(self):
        self.resets += 1
        self.grad_data.zero_()

    def begin(self):
        """A step, whose buffer holds what the step before has left."""
        self.grad_data.fill_(torch.nan)
        _zero_the_rest(Buffer.reset)(self)

    def reduce(self):
        return _settle_before(lambda group, scale: group.grad_data * scale)(self, 2.0)


def product(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, ROWS, generator=generator), torch.randn(7, COLUMNS, generator=generator)


def test_a_weight_whose_product_asks_is_not_zeroed():
    buffer = Buffer()
    asking = buffer.params[1]
    buffer.begin()
    assert buffer.resets == 1
    add_weight_gradient(asking.main_grad, *product(0))
    buffer.begin()
    assert buffer.resets == 1
    assert asking.main_grad.isnan().all()
    assert buffer.grad_data.isnan().sum() == SIZE
    for seed in (1, 2):
        add_weight_gradient(asking.main_grad, *product(seed))
    exact = sum(gradient.t() @ given for gradient, given in (product(1), product(2)))
    torch.testing.assert_close(asking.main_grad, exact)
    reduced = buffer.reduce()
    start, end, _ = buffer.param_index_map[asking]
    assert torch.equal(reduced[start:end].view(ROWS, COLUMNS), asking.main_grad * 2)
    assert reduced.count_nonzero() == SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_with_zeros(dtype):
    zeroed, waiting = Buffer(), Buffer()
    for _ in range(2):
        waiting.begin()
        zeroed.reset()
        for parameter in (0, 2, 0):
            gradient, given = (tensor.to(dtype) for tensor in product(parameter))
            for buffer in (zeroed, waiting):
                add_weight_gradient(buffer.params[parameter].main_grad, gradient, given)
    assert waiting.resets == 1
    assert torch.equal(zeroed.reduce(), waiting.reduce())


def test_a_weight_without_a_gradient_is_zero_when_it_is_reduced():
    buffer = Buffer()
    for parameter in buffer.params:
        add_weight_gradient(parameter.main_grad, *product(0))
    buffer.begin()
    add_weight_gradient(buffer.params[0].main_grad, *product(3))
    reduced = buffer.reduce()
    assert reduced.isfinite().all()
    assert reduced.count_nonzero() == SIZE
    # From then on what comes late is added.
    add_weight_gradient(buffer.params[1].main_grad, *product(4))
    add_weight_gradient(buffer.params[1].main_grad, *product(4))
    gradient, given = product(4)
    torch.testing.assert_close(buffer.params[1].main_grad, 2 * gradient.t() @ given)


@pytest.mark.parametrize(
    ("name", "value"), [("shared_embedding", True), ("zero_out_wgrad", True), ("main_grad_copy_in_grad_buffer", 1)]
)
def test_a_gradient_that_others_add_to_too_is_zeroed(name, value):
    buffer = Buffer()
    setattr(buffer.params[2], name, value)
    add_weight_gradient(buffer.params[2].main_grad, *product(0))
    buffer.begin()
    assert buffer.resets == 1
    assert not buffer.params[2].main_grad.any()


def test_a_buffer_without_anything_else():
    buffer = Buffer(1)
    buffer.grad_data = buffer.grad_data[1 : SIZE + 1]
    buffer.param_index_map = {buffer.params[0]: (0, SIZE, 0)}
    add_weight_gradient(buffer.params[0].main_grad, *product(0))
    buffer.begin()
    assert buffer.resets == 0
    assert buffer.grad_data.isnan().all()
    assert not buffer.reduce().any()


def test_gradients_apart_from_the_buffer_are_zeroed():
    buffer = Buffer()
    buffer.extra_main_grads = [torch.ones(3)]
    add_weight_gradient(buffer.params[0].main_grad, *product(0))
    buffer.begin()
    assert not buffer.extra_main_grads[0].any()


@pytest.mark.parametrize("added", [False, True])
def test_what_autograd_adds_is_added_to_zero(added):
    class Model:
        def make(self, param):
            def hook(*_):
                if not param.grad_added_to_main_grad:
                    param.main_grad.add_(param.grad)

            return hook

    buffer = Buffer()
    weight = buffer.params[1]
    add_weight_gradient(weight.main_grad, *product(0))
    buffer.begin()
    weight.grad, weight.grad_added_to_main_grad = torch.ones(ROWS, COLUMNS), added
    hook = _settle_before_autograd(Model.make)(Model(), weight)
    for _ in range(2):
        hook(None)
    # Where a product has said that the gradient is in the buffer, nothing is touched.
    assert weight.main_grad.isnan().all() if added else torch.equal(weight.main_grad, 2 * weight.grad)


def test_captured_graphs_keep_their_zeros():
    assert len(first_gradient_seams(Namespace())) == 3
    assert len(first_gradient_seams(Namespace(cuda_graph_impl="none", enable_cuda_graph=False))) == 3
    for flags in ({"cuda_graph_impl": "local"}, {"enable_cuda_graph": True}, {"external_cuda_graph": True}):
        assert first_gradient_seams(Namespace(**flags)) == []
