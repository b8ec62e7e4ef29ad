"""What the host knows without asking the device."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ru.plugin import host_ahead
from megatron_ru.seams.stand_in import stand_in


class Group:
    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


def refuse(*arguments, **keywords):
    raise AssertionError("asked")


def test_a_rank_alone_asks_nobody():
    both = host_ahead._alone(bool)(refuse)
    assert both(True, group=Group(1)) is True
    assert both(False, Group(1)) is False
    largest = host_ahead._alone(host_ahead._as_scalar)(refuse)
    assert largest(None, group=Group(1)) is None
    assert largest(2.5, group=Group(1)) == 2.5
    norm = largest(torch.tensor([3.0]), group=Group(1))
    assert f"{norm:.2f}" == "3.00"


def test_several_ranks_ask_each_other():
    asked = []
    reduce = host_ahead._alone(bool)(lambda value, group=None: asked.append((value, group)) or False)
    group = Group(2)
    assert reduce(True, group=group) is False
    assert asked == [(True, group)]


def test_known_numbers_are_filled():
    made = host_ahead._torch_that_fills(stand_in(torch))
    found = made.tensor([0.5], dtype=torch.float64, device="cpu")
    assert torch.equal(found, torch.tensor([0.5], dtype=torch.float64))
    assert made.tensor([1, 2]).tolist() == [1, 2]
    assert made.float32 is torch.float32


@pytest.mark.parametrize("scaler", [None, object()])
def test_a_loss_scale_of_one_is_known(scaler, monkeypatch):
    given = torch.tensor([1.0])
    get = host_ahead._known(lambda self: given)
    optimizer = SimpleNamespace(grad_scaler=scaler)
    found = get(optimizer)
    assert (found is given) is (scaler is not None)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    if scaler is None:
        assert found.item() == 1.0
        scaled = torch.tensor(4.0) * found
        assert type(scaled) is torch.Tensor
        assert torch.equal(scaled, torch.tensor([4.0]))


def test_gradients_are_scaled_by_a_number_on_the_device():
    gradients = [torch.ones(3), torch.full((2, 2), 2.0)]
    host_ahead._scale(0, torch.zeros(1), [gradients, gradients], torch.tensor([0.5]))
    assert torch.equal(gradients[0], torch.full((3,), 0.5))
    copies = [torch.zeros(3), torch.zeros(2, 2)]
    host_ahead._scale(0, torch.zeros(1), [gradients, copies], torch.tensor([2.0]))
    assert torch.equal(copies[1], torch.full((2, 2), 2.0))
