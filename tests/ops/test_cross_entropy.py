"""Cross entropy beside torch's own, and what it promises about memory, passes and reductions."""

import pytest
import torch
from torch.nn import functional as F

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import backend
from megatron_ru.ops.cross_entropy import cross_entropy, rescale_, vocab_parallel_cross_entropy


@pytest.fixture(autouse=True, params=["all", "none"])
def form(request):
    with backend.only(request.param):
        yield request.param


def sample(rows=(4, 5), vocab=33, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*rows, vocab, generator=generator) * 2).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, rows, generator=generator)
    target.view(-1)[3] = -100
    return logits, target


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_torch_s_own_function(reduction, label_smoothing):
    logits, target = sample()
    found = cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
    expected = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction=reduction, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
    found_gradient = torch.autograd.grad(found.sum(), logits)[0]
    torch.testing.assert_close(found_gradient, torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-4, atol=1e-6)


def test_a_mean_without_a_graph_is_that_of_one_with():
    logits, target = sample()
    with torch.no_grad():
        found = cross_entropy(logits, target, reduction="mean")
    torch.testing.assert_close(found, cross_entropy(logits, target, reduction="mean").detach(), rtol=1e-6, atol=0)


def test_z_loss_pulls_the_normaliser_to_one():
    logits, target = sample()
    found = cross_entropy(logits, target, z_loss=0.5)
    lse = logits.logsumexp(-1)
    expected = torch.where(
        target == -100, 0.0, F.cross_entropy(logits.movedim(-1, 1), target, reduction="none") + lse**2 / 2
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_values_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([2])).item() == pytest.approx(1.3862944, rel=1e-6)
    # Half of the way to uniform changes nothing where everything is uniform.
    assert cross_entropy(logits, torch.tensor([2]), label_smoothing=0.5).item() == pytest.approx(1.3862944, rel=1e-6)
    assert cross_entropy(logits, torch.tensor([2]), z_loss=1.0).item() == pytest.approx(
        1.3862944 + 1.3862944**2, rel=1e-6
    )


def test_all_targets_ignored():
    logits, target = sample()
    target.fill_(-100)
    losses = cross_entropy(logits, target)
    losses.sum().backward()
    assert not losses.any()
    assert not logits.grad.any()
    assert cross_entropy(logits, target, reduction="mean").isnan()


def test_out_of_range_target_spoils_its_row_alone():
    logits, target = sample()
    target.view(-1)[0] = 33
    losses = cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isnan().sum() == 1
    assert gradient.isnan().any(-1).sum() == 1
    assert gradient.flatten(0, 1)[0].isnan().all()


@pytest.mark.parametrize("one_pass", [False, True])
def test_in_place_gives_the_gradient_in_the_storage_of_the_logits(one_pass):
    leaf, target = sample()
    expected = torch.autograd.grad(cross_entropy(leaf, target).sum(), leaf)[0]
    logits = leaf * 1
    losses = cross_entropy(logits, target, in_place=True, one_pass=one_pass)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_in_place_can_run_backward_once():
    leaf, target = sample()
    for losses in (
        cross_entropy(leaf * 1, target, in_place=True, reduction="mean"),
        vocab_parallel_cross_entropy(leaf * 1, target, None, in_place=True).sum(),
    ):
        losses.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.backward()


def test_in_place_without_gradients_leaves_the_logits():
    logits, target = sample()
    before = logits.detach().clone()
    with torch.no_grad():
        cross_entropy(logits, target, in_place=True, reduction="mean")
        vocab_parallel_cross_entropy(logits, target, None, in_place=True)
    assert torch.equal(logits, before)


def test_loss_scale_that_was_expected_saves_small_fp16_gradients():
    """Of 4096 tokens, an unlikely one has a gradient of 1e-8 in the mean: nothing in fp16, and enough times 1024."""
    logits = torch.zeros(4096, 8)
    logits[:, 1] = 10.0
    logits = logits.half().requires_grad_()
    target = torch.ones(4096, dtype=torch.int64)
    scale = torch.tensor(1024.0)
    loss = cross_entropy(logits, target, reduction="mean", expected_gradient=scale)
    (gradient,) = torch.autograd.grad(loss * scale, logits)
    wide = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, target) * 1024, wide)
    assert expected[0, 0] / 1024 < 3e-8
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-2, atol=0)


def test_rescale_touches_rows_whose_factor_differs():
    gradient = torch.arange(12.0).reshape(3, 4)
    expected = gradient * torch.tensor([[1.0], [3.0], [1.0]])
    rescale_(gradient, torch.tensor([2.0, 6.0, 1.0]), torch.tensor([2.0, 2.0, 1.0]))
    assert torch.equal(gradient, expected)
    rescale_(gradient, torch.tensor(2.0), None)
    assert torch.equal(gradient, expected * 2)
    # Nothing is multiplied with one: what is not a number stays what it was.
    bits = torch.full((1, 2), float("nan"))
    rescale_(bits, torch.tensor(5.0), torch.tensor(5.0))
    assert bits.isnan().all()


def test_fp32_gradients_are_not_cut_to_half_precision():
    """Megatron's fused cross entropy rounds them to bf16: an error of 4e-3."""
    logits, target = sample((64,), 1000)
    wide = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, target, reduction="sum"), wide)
    for losses in (cross_entropy(logits, target), vocab_parallel_cross_entropy(logits, target, None)):
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert (gradient.double() - expected).abs().max() < 1e-6


def test_unknown_reduction():
    with pytest.raises(UserError) as error:
        cross_entropy(*sample(), reduction="average")
    assert str(error.value) == "reduction 'average' is unknown, expected one of none, mean, sum"
