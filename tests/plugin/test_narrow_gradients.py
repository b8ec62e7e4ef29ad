"""Gradients that AdamW reads in bf16."""

from argparse import Namespace

import pytest
import torch

from megatron_ru.plugin.narrow_gradients import _without_copies, narrow_gradient_seams
from megatron_ru.plugin.optimizer_step import MegatronAdamW

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")


class MixedPrecision:
    """What Megatron's optimizers have of gradients: those of the model, and where its optimizer looks for them."""

    def __init__(self, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        self.mains = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,))]
        self.reduced = [torch.randn(main.shape, generator=generator).to(dtype) for main in self.mains]
        self.optimizer = MegatronAdamW(self.mains, lr=0.1)
        self.grad_scaler = None

    def copy(self):
        for main, reduced in zip(self.mains, self.reduced, strict=True):
            main.grad = reduced.view(-1)[:].view(main.shape).float()


def test_a_step_reads_what_was_reduced():
    ours, plain = MixedPrecision(), MixedPrecision()
    for _ in range(3):
        _without_copies(MixedPrecision.copy)(ours)
        plain.copy()
        for main, reduced in zip(ours.mains, ours.reduced, strict=True):
            assert main.grad.dtype is torch.bfloat16
            assert main.grad.data_ptr() == reduced.data_ptr()
        for mixed in (ours, plain):
            mixed.optimizer.step()
        for one, other in zip(ours.mains, plain.mains, strict=True):
            assert torch.equal(one, other)
    # Megatron's own, where the flag is gone.
    MixedPrecision.copy(ours)
    assert ours.mains[0].grad.dtype is torch.float32


def test_gradients_in_fp32_and_of_scaled_losses_stay_megatrons():
    wide = MixedPrecision(torch.float32)
    _without_copies(MixedPrecision.copy)(wide)
    assert wide.mains[0].grad.dtype is torch.float32
    scaled = MixedPrecision()
    scaled.grad_scaler = object()
    _without_copies(MixedPrecision.copy)(scaled)
    assert scaled.mains[0].grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("flags", "count"), [({"bf16": True, "wide": False}, 2), ({"bf16": True, "wide": True}, 0), ({"bf16": False}, 0)]
)
def test_only_narrow_buffers_have_seams(flags, count):
    args = Namespace(bf16=flags["bf16"], accumulate_allreduce_grads_in_fp32=flags.get("wide", False))
    assert len(narrow_gradient_seams(args)) == count
