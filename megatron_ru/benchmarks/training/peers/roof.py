"""What nobody can be faster than by fusing: the matrix products of a step and its attention, and nothing else.

They run in the order of a training step, so that the GPU draws the power and reaches the clocks of one.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.training.peer import TrainingPeer, register
from megatron_ru.benchmarks.training.sdpa import causal_attention, fast_kernels
from megatron_ru.benchmarks.training.task import ROOF, Task
from megatron_ru.models.step_flops import Shape
from megatron_ru.plugin.step_measurement import StepMeasurement


class Product:
    """One linear layer in bf16: forward, gradient of its input, gradient of its weight, into memory that is there."""

    def __init__(self, tokens: int, inputs: int, outputs: int, device: str):
        kind = {"dtype": torch.bfloat16, "device": device}
        self.weight = torch.randn(outputs, inputs, **kind) / inputs**0.5  # type: ignore[arg-type]
        self.x = torch.randn(tokens, inputs, **kind)  # type: ignore[arg-type]
        self.y_gradient = torch.randn(tokens, outputs, **kind)  # type: ignore[arg-type]
        self.y, self.x_gradient = torch.empty_like(self.y_gradient), torch.empty_like(self.x)
        self.weight_gradient = torch.empty_like(self.weight)

    def forward(self) -> None:
        """[tokens, outputs]."""
        torch.mm(self.x, self.weight.t(), out=self.y)

    def backward(self) -> None:
        """[tokens, inputs] and [outputs, inputs]."""
        torch.mm(self.y_gradient, self.weight, out=self.x_gradient)
        torch.mm(self.y_gradient.t(), self.x, out=self.weight_gradient)


class Attention:
    """Causal attention of all heads, forward and backward."""

    def __init__(self, task: Task, shape: Shape, device: str):
        def heads(count: int, wants_gradient: bool = True) -> Tensor:
            made = torch.randn(
                task.micro_batch, task.sequence, count, shape.head_size, dtype=torch.bfloat16, device=device
            )
            return made.transpose(1, 2).requires_grad_(wants_gradient)

        self.inputs = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)
        self.gradient = heads(shape.heads, wants_gradient=False)
        self.device = device

    def forward(self) -> Tensor:
        """[batch, heads, sequence, head_dim]."""
        with fast_kernels(self.device):
            return causal_attention(*self.inputs)

    def backward(self, output: Tensor) -> None:
        """Gradients of queries, keys and values."""
        torch.autograd.grad(output, self.inputs, self.gradient)


def measure(task: Task, shape: Shape) -> dict[str, Any]:
    """The document of such steps; an update takes no time."""
    device, tokens = task.device, task.tokens
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = (
        (shape.hidden, query + 2 * key), (query, shape.hidden),
        (shape.hidden, (2 if shape.gated else 1) * shape.ffn), (shape.ffn, shape.hidden),
    )  # fmt: skip
    # Of each layer its own weights, as in a model: a cache that keeps them would be no roof. The rest is shared.
    first = [Product(tokens, *size, device) for size in sizes]
    layers = [first]
    for _ in range(shape.layers - 1):
        layers.append([_with_own_weight(product) for product in first])
    head = Product(tokens, shape.hidden, shape.vocabulary, device)
    attention = Attention(task, shape, device)
    measurement = StepMeasurement(device, task.traced)
    for _ in range(task.steps):
        measurement.begin()
        outputs = []
        for products in layers:
            products[0].forward()
            outputs.append(attention.forward())
            for product in products[1:]:
                product.forward()
        head.forward()
        head.backward()
        for products in reversed(layers):
            for product in reversed(products[1:]):
                product.backward()
            attention.backward(outputs.pop())
            products[0].backward()
        measurement.between()
        measurement.end()
    measurement.close()
    return measurement.document(shape, tokens, gpus=1)


def _with_own_weight(product: Product) -> Product:
    other = object.__new__(Product)
    other.__dict__.update(product.__dict__, weight=product.weight.clone())
    return other


register(
    TrainingPeer(name=ROOF, title="matrix products and attention alone", missing=lambda device: "", measure=measure)
)
