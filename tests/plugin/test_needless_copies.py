"""Copies that are left out, and copies that are made."""

import torch

from megatron_ru.plugin.needless_copies import NeedlessCopies


def test_parts_of_one_matrix_are_that_matrix():
    weight = torch.nn.Parameter(torch.randn(6, 4))
    gate, up = weight.detach().chunk(2)
    with NeedlessCopies():
        joined = torch.cat([gate, up])
        also = torch.cat((gate, up), 0)
    assert joined.data_ptr() == also.data_ptr() == weight.data_ptr()
    assert torch.equal(joined, weight)
    assert torch.cat([gate, up]).data_ptr() != weight.data_ptr()


def test_other_parts_are_put_together_elsewhere():
    memory = torch.randn(8, 4)
    others = [
        (memory[4:], memory[:4]),
        (memory[:2], memory[4:]),
        (memory[:4, :2], memory[4:, :2]),
        (torch.randn(2, 4), torch.randn(2, 4)),
        (memory[:4],),
        (memory[0], memory[1]),
    ]
    with NeedlessCopies():
        for parts in others:
            joined = torch.cat(parts)
            assert torch.equal(joined, torch.cat(list(parts), dim=0))
            assert joined.data_ptr() != parts[0].data_ptr()
        across = torch.cat([memory[:4], memory[4:]], 1)
    assert across.shape == (4, 8)


def test_a_tensor_is_not_copied_onto_itself():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    version = weight._version
    with NeedlessCopies(), torch.no_grad():
        assert weight.copy_(weight.detach()) is weight
        assert weight._version == version
        weight.copy_(torch.ones(3, 4))
        assert (weight == 1).all()
        square = torch.arange(9.0).view(3, 3)
        square.copy_(square.t().clone())
        assert square[0].tolist() == [0, 3, 6]
        # The same memory in another order, or read as other numbers, is no copy onto itself.
        other = torch.arange(4.0)
        other.view(2, 2).copy_(torch.ones(2, 2))
        other.copy_(other.view(torch.int32))
    assert other.tolist() == [float(torch.tensor(1.0).view(torch.int32))] * 4
