"""Clipping and copies inside AdamW."""

import pytest
import torch

from megatron_ru.plugin import optimizer_step
from megatron_ru.plugin.optimizer_step import MegatronAdamW


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def refuse(*arguments, **keywords):
    raise AssertionError("Megatron's own was called")


@pytest.mark.parametrize("norm", [4.0, torch.tensor([4.0]), 0.25])
def test_a_clipped_step_is_one_of_scaled_gradients(norm):
    clipped, expected = parameters(), parameters()
    ours, plain = MegatronAdamW(clipped, lr=0.1), torch.optim.AdamW(expected, lr=0.1)
    given = [parameter.grad.clone() for parameter in clipped]
    for _ in range(2):
        for parameter, gradient in zip(clipped, given, strict=True):
            parameter.grad = gradient.clone()
        optimizer_step._clip_in_step(refuse)(clipped, 1.0, norm)
        ours.step()
        for parameter, gradient in zip(expected, given, strict=True):
            parameter.grad = gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        plain.step()
    for one, other in zip(clipped, expected, strict=True):
        torch.testing.assert_close(one, other)
    # The factor is for one step.
    for one, other, gradient in zip(clipped, expected, given, strict=True):
        one.grad, other.grad = gradient.clone(), gradient
    ours.step()
    plain.step()
    torch.testing.assert_close(clipped[0], expected[0])


def test_a_part_of_the_parameters_is_clipped_by_megatron():
    made = parameters()
    optimizer = MegatronAdamW(made, lr=0.1)
    asked = []
    clip = optimizer_step._clip_in_step(lambda *given, **keywords: asked.append(given))
    clip(made[:1], 1.0, 2.0)
    clip(made, 1.0, 2.0, use_decoupled_grad=True)
    assert [given[1:] for given in asked] == [(1.0, 2.0)] * 2
    assert optimizer is optimizer_step._optimizer_of(made)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")
def test_megatron_clips_a_part_in_fp32():
    made, whole = parameters(), parameters()
    optimizer, plain = MegatronAdamW(made, lr=0.1), MegatronAdamW(whole, lr=0.1)
    for one, other in zip(made, whole, strict=True):
        one.grad_dtype = None
        one.grad = one.grad.bfloat16()
        other.grad = one.grad.float()
    whole[0].grad *= 0.3

    def megatrons(given, max_norm, total_norm):
        for parameter in given:
            assert parameter.grad.dtype is torch.float32
            parameter.grad *= max_norm / total_norm

    optimizer_step._clip_in_step(megatrons)(made[:1], 0.3, 1.0)
    assert {parameter.grad.dtype for parameter in made[1:]} == {torch.bfloat16}
    optimizer.step()
    plain.step()
    for one, other in zip(made, whole, strict=True):
        assert torch.equal(one, other)


class MixedPrecision:
    """What Megatron's optimizers have of main and model parameters."""

    def __init__(self):
        self.mains = parameters()
        self.optimizer = MegatronAdamW(self.mains, lr=0.1)
        self.float16_groups = [[main.detach().bfloat16() for main in self.mains]]
        self.passes = 0

    def copy(self):
        self.passes += 1
        with torch.no_grad():
            for main, model in zip(self.mains, self.float16_groups[0], strict=True):
                model.data.copy_(main)


def test_copies_are_made_by_the_step_once_they_were_watched():
    mixed = MixedPrecision()
    copy = optimizer_step._copy_in_step(MixedPrecision.copy)
    for _ in range(4):
        mixed.optimizer.step()
        copy(mixed)
        for main, model in zip(mixed.mains, mixed.float16_groups[0], strict=True):
            assert torch.equal(model, main.detach().bfloat16())
    assert mixed.passes == 1


def test_copies_without_a_step_and_into_other_memory_are_megatrons():
    mixed = MixedPrecision()
    copy = optimizer_step._copy_in_step(MixedPrecision.copy)
    mixed.optimizer.step()
    copy(mixed)
    with torch.no_grad():
        mixed.mains[0].zero_()
    copy(mixed)
    assert mixed.passes == 2
    assert not mixed.float16_groups[0][0].any()
    mixed.float16_groups = [[model.clone() for model in mixed.float16_groups[0]]]
    mixed.optimizer.step()
    copy(mixed)
    assert mixed.passes == 3
    assert torch.equal(mixed.float16_groups[0][1], mixed.mains[1].detach().bfloat16())


def test_a_pass_that_does_more_than_copy_stays():
    mixed = MixedPrecision()

    def copy_and_round(self):
        self.passes += 1
        for main, model in zip(self.mains, self.float16_groups[0], strict=True):
            model.data.copy_(main.detach() * 2)

    copy = optimizer_step._copy_in_step(copy_and_round)
    for _ in range(3):
        mixed.optimizer.step()
        copy(mixed)
    assert mixed.passes == 3
    assert torch.equal(mixed.float16_groups[0][0], (mixed.mains[0].detach() * 2).bfloat16())


def test_the_norm_of_many_gradients():
    tensors = [parameter.grad for parameter in parameters()]

    def local_norm(*arguments):
        raise AssertionError("Megatron's own was called")

    norm, each = optimizer_step._norm_without_waiting(local_norm)(0, torch.zeros(1), [tensors], False)
    exact = torch.cat([tensor.flatten() for tensor in tensors]).double().norm()
    torch.testing.assert_close(norm.double().squeeze(), exact, rtol=1e-6, atol=0)
    assert norm.shape == (1,)
    assert each is None
    # Apex's and TransformerEngine's stay.
    assert optimizer_step._norm_without_waiting(refuse) is refuse
