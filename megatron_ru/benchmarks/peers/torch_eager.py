"""Torch as it is: the plain forms of our op files, and torch's own fused functions where it has them."""

from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.peer import Peer, Prepared, leaves_of, only_default, register
from megatron_ru.ops.op import BenchmarkCase, Call, Op


def plain(op: Op, case: BenchmarkCase, call: Call) -> Prepared:
    """The plain form of the op's file."""
    return Prepared(run=lambda: call.run(op.plain), leaves=tuple(call.leaves()))


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str = "none",
    **_: Any,
) -> Prepared:
    only_default(z_loss=z_loss)

    def run() -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )

    return Prepared(run=run, leaves=(logits,))


def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    **_: Any,
) -> Prepared:
    only_default(z_loss=z_loss, token_weights=token_weights)

    def run() -> Tensor:
        logits = torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing
        )

    return Prepared(run=run, leaves=leaves_of(x, weight, bias))


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: list[Tensor],
    maximize: bool,
    gradient_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Prepared:
    steps = [step.clone() for _ in parameters]

    def run() -> None:
        given = gradients
        if given[0].dtype != parameters[0].dtype:
            # Its fused step takes gradients of the parameters' dtype alone.
            given = [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)]
        torch._fused_adamw_(
            parameters, given, first_moments, second_moments, [], steps,
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False,
            maximize=maximize, grad_scale=gradient_scale, found_inf=found_inf,
        )  # fmt: skip
        if copies:
            torch._foreach_copy_(copies, parameters)

    return Prepared(run=torch.no_grad()(run), leaves=())


register(
    Peer(
        name="torch",
        title="torch",
        module="torch",
        distribution="torch",
        summary="torch's own functions, not compiled",
        adapters={
            "cross_entropy": {"": _cross_entropy},
            "vocab_parallel_cross_entropy": {"": lambda group, **arguments: _cross_entropy(**arguments)},
            "linear_cross_entropy": {"": _linear_cross_entropy},
            "adamw": {"": _adamw},
        },
        fallback=plain,
        needs_cuda=False,
    )
)
