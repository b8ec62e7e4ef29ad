"""Tables of cosines and sines from Megatron's angles."""

import pytest
import torch

from megatron_ru.models import rotary
from megatron_ru.models.rotary import rotary_tables, rotates


@pytest.fixture(autouse=True)
def nothing_kept():
    rotary.forget_tables()
    yield
    rotary.forget_tables()


def angles_of(length=7, size=12, interleaved=False):
    """As Megatron's RotaryEmbedding gives them: [length, 1, 1, size], each angle twice."""
    half = torch.outer(torch.arange(length).float(), 10000 ** -(torch.arange(0, size, 2) / size))
    whole = torch.stack((half, half), -1).flatten(1) if interleaved else torch.cat((half, half), -1)
    return whole[:, None, None, :]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_tables_are_cosines_and_sines_of_each_angle_once(interleaved, scale):
    angles = angles_of(interleaved=interleaved)
    cos, sin = rotary_tables(angles, interleaved=interleaved, scale=scale)
    expected = torch.outer(torch.arange(7).double(), 10000 ** -(torch.arange(0, 12, 2).double() / 12))
    torch.testing.assert_close(cos.double(), expected.cos() * scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.double(), expected.sin() * scale, rtol=0, atol=1e-6)
    assert cos.is_contiguous()
    assert sin.is_contiguous()


def test_the_same_angles_give_the_same_tables():
    angles = angles_of()
    first = rotary_tables(angles)
    assert rotary_tables(angles)[0] is first[0]
    # Activation recomputation hands on detached copies.
    assert rotary_tables(angles.detach())[1] is first[1]
    # Other questions about the same angles are other tables.
    assert rotary_tables(angles, scale=2.0)[0] is not first[0]
    assert rotary_tables(angles, interleaved=True)[0] is not first[0]
    assert rotary_tables(angles[:3])[0].shape == (3, 6)


def test_angles_that_changed_in_place_are_other_angles():
    angles = angles_of()
    before = rotary_tables(angles)[0].clone()
    angles.mul_(2)
    after = rotary_tables(angles)[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, angles[:, 0, 0, :6].cos())


def test_the_few_tables_used_last_are_kept():
    training = angles_of(24)
    table, _ = rotary_tables(training)
    for length in range(1, 20):
        rotary_tables(angles_of(length))
        assert rotary_tables(training)[0] is table
    assert len(rotary._recent) == rotary._KEPT


def test_tables_made_in_inference_mode_can_be_trained_with():
    angles = angles_of()
    with torch.inference_mode():
        cos, _ = rotary_tables(angles)
        rotary_tables(angles_of(5))
    assert not cos.is_inference()
    x = torch.randn(7, 6, requires_grad=True)
    (x * rotary_tables(angles)[0]).sum().backward()
    assert torch.equal(x.grad, cos)


def test_what_the_op_is_made_for():
    angles = angles_of(7, 12)
    t = torch.randn(7, 2, 3, 16)
    assert rotates(t, angles)
    assert rotates(t.bfloat16(), angles)
    assert rotates(torch.randn(7, 2, 3, 32)[..., 16:], angles), "a slice of the mixed projection"
    refused = {
        "another length": (t[:6], angles),
        "wider than the head": (t[..., :8], angles),
        "angles per sequence of the batch": (t, angles.expand(7, 2, 1, 12)),
        "packed": (t[:, 0], angles),
        "float64": (t.double(), angles),
        "channels apart": (torch.randn(7, 2, 16, 3).transpose(2, 3), angles),
        "learned angles": (t, angles.clone().requires_grad_()),
        "half-precision angles": (t, angles.half()),
    }
    for why, (tensor, of) in refused.items():
        assert not rotates(tensor, of), why
