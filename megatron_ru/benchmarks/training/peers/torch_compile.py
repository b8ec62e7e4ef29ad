"""A plain Llama in PyTorch under torch.compile."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_ru.benchmarks.training.peer import Built, TrainingPeer, register
from megatron_ru.benchmarks.training.sdpa import causal_attention, fast_kernels
from megatron_ru.models.step_flops import Shape
from megatron_ru.models.variant import Variant

_STANDARD_DEVIATION = 0.02


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU; queries, keys and values of one matrix, gate and input of another."""

    def __init__(self, shape: Shape, epsilon: float):
        super().__init__()
        self.sizes = [shape.heads * shape.head_size, *[shape.kv_heads * shape.head_size] * 2]
        self.head_size = shape.head_size
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=epsilon)
        self.query_key_value = nn.Linear(shape.hidden, sum(self.sizes), bias=False)
        self.attention_output = nn.Linear(self.sizes[0], shape.hidden, bias=False)
        self.feed_forward_norm = nn.RMSNorm(shape.hidden, eps=epsilon)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, sequence, hidden] from the same; cos and sin: [sequence, head_size]."""
        batch, sequence, _ = x.shape
        parts = self.query_key_value(self.attention_norm(x)).split(self.sizes, dim=-1)
        q, k, v = (part.view(batch, sequence, -1, self.head_size).transpose(1, 2) for part in parts)
        context = causal_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
        x = x + self.attention_output(context.transpose(1, 2).reshape(batch, sequence, -1))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        result: Tensor = x + self.down(functional.silu(gate) * up)
        return result


class Llama(nn.Module):
    """Tokens to the mean loss."""

    def __init__(self, variant: Variant, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, variant.norm_epsilon) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=variant.norm_epsilon)
        self.output = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        powers = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
        angles = torch.outer(torch.arange(shape.sequence, dtype=torch.float32), variant.rotary_base**-powers)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_STANDARD_DEVIATION)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss []."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.output(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build(variant: Variant, shape: Shape, device: str) -> Built:
    """The whole model is one graph."""
    with torch.device(device):
        model = Llama(variant, shape).to(torch.bfloat16)
    compiled = torch.compile(model)
    return Built(model=model, loss=functools.partial(_loss, compiled, device))


def _loss(compiled: nn.Module, device: str, tokens: Tensor, targets: Tensor) -> Tensor:
    with fast_kernels(device):
        result: Tensor = compiled(tokens, targets)
    return result


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


register(TrainingPeer(name="compile", title="torch.compile", missing=lambda device: "", build=build))
