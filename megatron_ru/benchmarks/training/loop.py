"""The training loop of the peers: bf16 weights, fp32 master weights under torch's fused AdamW, gradients clipped to 1.

Gradients of the masters exist for one part of the parameters at a time, so that they add little to the peak.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ru.benchmarks.training.peer import Built
from megatron_ru.benchmarks.training.task import Task
from megatron_ru.models.step_flops import Shape
from megatron_ru.plugin.step_measurement import StepMeasurement

CLIP = 1.0
# Parameters in one call of the optimizer: 1 GiB of fp32 gradients.
_PART = 2**28


def train(built: Built, task: Task, shape: Shape) -> dict[str, Any]:
    """Trains on random tokens of a fixed seed and gives the measurement's document."""
    measurement = StepMeasurement(task.device, task.traced)
    optimizer = MasterAdamW(built.model, task.learning_rate)
    losses: list[Tensor] = []
    for tokens, targets in batches(task, shape):
        measurement.begin()
        for parameter in built.model.parameters():
            parameter.grad = None
        loss = built.loss(tokens, targets)
        torch.autograd.backward(loss)
        measurement.between()
        optimizer.step()
        measurement.end()
        losses.append(loss.detach())
        del loss
    measurement.close()
    document = measurement.document(shape, task.tokens, gpus=1)
    return {**document, "first_loss": float(losses[0]), "last_loss": float(losses[-1])}


def batches(task: Task, shape: Shape) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch of random tokens for each step, targets shifted by one, on the device before the step begins."""
    generator = torch.Generator().manual_seed(task.seed)
    rows = shape.vocabulary - shape.vocabulary // 64
    for _ in range(task.steps):
        ids = torch.randint(rows, (task.micro_batch, task.sequence + 1), generator=generator).to(task.device)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class MasterAdamW:
    """AdamW on fp32 copies of a model's parameters, which get the result in their own dtype."""

    def __init__(self, model: nn.Module, learning_rate: float):
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._parts: list[tuple[list[nn.Parameter], list[Tensor], torch.optim.AdamW]] = []
        for part in _parts(self._parameters):
            masters = [parameter.detach().float().clone().requires_grad_() for parameter in part]
            adamw = torch.optim.AdamW(masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            self._parts.append((part, masters, adamw))

    @torch.no_grad()
    def step(self) -> None:
        """Clips, steps and hands the weights out; the gradients of the model stay."""
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP, foreach=True)
        for part, masters, adamw in self._parts:
            for parameter, master in zip(part, masters, strict=True):
                master.grad = parameter.grad.float()  # type: ignore[union-attr]
            adamw.step()
            torch._foreach_copy_([parameter.data for parameter in part], masters)
            for master in masters:
                master.grad = None


def _parts(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    part: list[nn.Parameter] = []
    for parameter in parameters:
        if part and sum(one.numel() for one in part) + parameter.numel() > _PART:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part
