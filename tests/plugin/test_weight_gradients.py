"""Gradients of weights that go straight into Megatron's buffer."""

from types import SimpleNamespace

import torch

from megatron_ru.ops.weight_gradient import await_first
from megatron_ru.plugin import weight_gradients
from megatron_ru.seams.stand_in import stand_in


def weight(rows=9, **marks):
    made = torch.nn.Parameter(torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)))
    made.main_grad = torch.ones(rows, 16)
    made.grad_added_to_main_grad = False
    for name, value in marks.items():
        setattr(made, name, value)
    return made


def look_up(made, ids):
    seen = weight_gradients._with_our_embedding(stand_in(torch.nn.functional))
    assert seen.linear is torch.nn.functional.linear
    return seen.embedding(ids, made)


def test_apexs_functions_add_to_the_buffer():
    functions = weight_gradients._functions(None)
    kept, gradient, given = torch.ones(4, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    functions.wgrad_gemm_accum_fp32(given, gradient, kept)
    wanted = 1 + torch.einsum("sbo,sbi->oi", gradient, given)
    torch.testing.assert_close(kept, wanted)


def test_apex_adds_to_zero_where_a_product_that_asks_came_first():
    def add(given, gradient, kept):
        kept += gradient.t() @ given

    functions = weight_gradients._functions(SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add))
    kept, gradient, given = torch.full((4, 3), torch.nan), torch.randn(5, 4), torch.randn(5, 3)
    await_first(kept)
    for _ in range(2):
        functions.wgrad_gemm_accum_fp32(given, gradient, kept)
    torch.testing.assert_close(kept, 2 * gradient.t() @ given)


def test_an_embedding_adds_its_rows():
    made, ids = weight(), torch.tensor([[1, 4, 1], [0, 8, 4]])
    out = look_up(made, ids)
    assert torch.equal(out, made[ids])
    upstream = torch.randn(2, 3, 16)
    out.backward(upstream)
    wanted = torch.ones(9, 16).index_add_(0, ids.flatten(), upstream.reshape(-1, 16))
    torch.testing.assert_close(made.main_grad, wanted)
    assert made.grad_added_to_main_grad is True


def test_a_shared_or_unbuffered_weight_goes_torchs_way():
    ids = torch.tensor([2, 2])
    for made in (weight(zero_out_wgrad=True), weight(main_grad=None)):
        look_up(made, ids).sum().backward()
        assert made.grad[2].tolist() == [2.0] * 16
        assert made.grad_added_to_main_grad is False
    with torch.no_grad():
        assert not look_up(weight(), ids).requires_grad
