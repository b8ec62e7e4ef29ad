"""A whole model's step with the ops, without them, and the calls that it makes of each."""

import pytest
import torch

from megatron_ru.ops import backend
from megatron_ru.plugin.fused_ops import fused_op_seams
from tests.compiled_calls import CompiledCalls, needs_library
from tests.models.test_gpt_model import ids_and_positions, randomise

pytestmark = needs_library


def step(model, variant, ops):
    """(losses, gradients by name, calls by op) of one batch with these ops, seams included."""
    model.eval().zero_grad()
    ids, positions = ids_and_positions(variant)
    with backend.only(ops):
        seams = fused_op_seams()
        for seam in seams:
            seam.install()
        try:
            with CompiledCalls() as counted:
                losses = model(ids, positions, None, labels=ids.roll(-1, 1))
                losses.mean().backward()
        finally:
            for seam in reversed(seams):
                seam.undo()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return losses.detach(), gradients, counted.calls


LAYERS = 2
LOSS = {"cross_entropy_statistics": 1, "cross_entropy_merge": 1, "cross_entropy_backward_": 1}
# All but the first with the residual sum before them.
NORMS = {"norm_forward": 2 * LAYERS + 1, "norm_backward": 2 * LAYERS + 1}
FEED_FORWARD = {"activation": LAYERS, "activation_backward": LAYERS}
# Queries and keys where the projection left them; backward puts its gradient together.
ROTATION = {"rope_qk_": LAYERS, "rope_join": LAYERS}


@pytest.mark.parametrize(
    ("name", "ops", "calls"),
    [
        ("llama2_tiny", "all", NORMS | FEED_FORWARD | ROTATION | LOSS),
        ("llama3_tiny", "all", NORMS | FEED_FORWARD | ROTATION | LOSS),
        ("llama2_tiny", "rms_norm", NORMS),
        ("llama2_tiny", "layer_norm,adamw", {}),
        ("llama2_tiny", "activation", FEED_FORWARD),
        ("llama2_tiny", "rope", ROTATION),
        ("llama2_tiny", "cross_entropy", LOSS),
        ("llama2_tiny", "none", {}),
        # Post-norm has no norm behind its last layer; positions are learned; biases come with the activation.
        ("gpt2_tiny", "layer_norm,activation", dict.fromkeys(NORMS, 2 * LAYERS) | FEED_FORWARD),
    ],
)
def test_a_step_calls_the_chosen_ops_and_gives_the_same(build_gpt, name, ops, calls):
    model, variant = build_gpt(name)
    randomise(model)
    losses, gradients, counted = step(model, variant, ops)
    assert counted == calls
    expected_losses, expected, none = step(model, variant, "none")
    assert none == {}
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    for key, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=2e-5 * scale, msg=key)


def test_without_ops_a_step_is_bit_for_bit_the_same_again(build_gpt):
    model, variant = build_gpt("llama2_tiny")
    randomise(model)
    first, _, _ = step(model, variant, "none")
    step(model, variant, "all")
    again, _, _ = step(model, variant, "none")
    assert torch.equal(first, again)
