"""Output layer and cross entropy together: the values of the two apart, in less memory."""

import pytest
import torch
from torch.nn import functional as F

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import backend
from megatron_ru.ops.linear_cross_entropy import _default_rows, linear_cross_entropy


@pytest.fixture(autouse=True, params=["all", "none"])
def form(request):
    with backend.only(request.param):
        yield request.param


def sample(rows=(6, 4), hidden=24, vocab=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, hidden, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, rows, generator=generator)
    target.view(-1)[::5] = -100
    return x, weight, target


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 7, 24, 100])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_torch_s_own_functions(rows_per_chunk, factor):
    x, weight, target = sample()
    loss, tokens = linear_cross_entropy(x, weight, target, rows_per_chunk=rows_per_chunk)
    gradients = torch.autograd.grad(loss * factor, (x, weight))
    logits = F.linear(x, weight).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    each = F.cross_entropy(logits, target.flatten(), reduction="none").reshape(target.shape)
    torch.testing.assert_close(tokens, each, rtol=1e-5, atol=1e-6)
    assert not tokens.requires_grad
    for found, wanted in zip(gradients, torch.autograd.grad(expected * factor, (x, weight)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_weights_of_tokens():
    x, weight, target = sample()
    weights = torch.linspace(0, 2, 24).reshape(6, 4)
    loss, tokens = linear_cross_entropy(x, weight, target, token_weights=weights, rows_per_chunk=5)
    torch.testing.assert_close(loss, (tokens * weights).sum())
    gradients = torch.autograd.grad(loss, (x, weight))
    each = F.cross_entropy(F.linear(x, weight).flatten(0, 1), target.flatten(), reduction="none")
    for found, wanted in zip(
        gradients, torch.autograd.grad((each * weights.flatten()).sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_asks_gets_a_gradient(frozen):
    leaves = list(sample())
    leaves[frozen] = leaves[frozen].detach()
    loss, _ = linear_cross_entropy(*leaves, rows_per_chunk=5)
    loss.backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad.any()


def test_expected_scale_saves_small_fp16_gradients():
    x, weight, target = sample((4096,), 8, 4, torch.float16)
    scale = torch.tensor(4096.0)
    loss, _ = linear_cross_entropy(x, weight, target, expected_gradient=scale)
    (gradient,) = torch.autograd.grad(loss * scale, x)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target) * 4096, wide[0])
    # The logits and their gradient are rounded to fp16, whose epsilon is 1e-3.
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=2e-3)


def test_without_gradients_nothing_is_kept():
    x, weight, target = sample()
    with torch.no_grad():
        silent, _ = linear_cross_entropy(x, weight, target, rows_per_chunk=5)
    loss, _ = linear_cross_entropy(x, weight, target, rows_per_chunk=5)
    assert silent.grad_fn is None
    torch.testing.assert_close(silent, loss.detach(), rtol=1e-6, atol=1e-6)


def test_no_tokens_at_all():
    x, weight, _ = sample()
    loss, tokens = linear_cross_entropy(x[:0], weight, torch.zeros(0, 4, dtype=torch.int64))
    assert tokens.shape == (0, 4)
    assert loss.isnan()


def test_backward_runs_once(form):
    if form == "none":
        return
    loss, _ = linear_cross_entropy(*sample())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_largest_tensor_is_a_chunk(form, monkeypatch):
    """No allocation of [rows, vocab] is made."""
    if form == "none":
        return
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t))
            return out

    x, weight, target = sample((64,), 16, 200)
    with Sizes():
        loss, _ = linear_cross_entropy(x, weight, target, rows_per_chunk=8)
        loss.backward()
    # The weight and its gradient are larger than a chunk here.
    assert max(sizes) == 200 * 16
    assert max(sizes) < 64 * 200


def test_chunks_are_equal_and_at_most_350_megabytes():
    def rows(tokens, vocab, dtype=torch.bfloat16):
        return _default_rows(tokens, torch.empty(vocab, 1, dtype=dtype, device="meta"))

    assert rows(8192, 40000) == 4096
    assert rows(100, 40000) == 100
    assert rows(16384, 128256) * 128256 * 2 < 360e6
    assert rows(16384, 128256) % 128 == 0


def test_wrong_weight():
    x, weight, target = sample()
    with pytest.raises(UserError) as error:
        linear_cross_entropy(x, weight.t(), target)
    assert str(error.value) == (
        "the weight has sizes [24, 50] beside x of [6, 4, 24]: expected [vocab, 24], the last size of x"
    )
