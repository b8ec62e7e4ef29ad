"""What the ways of recomputing one layer cost, measured on the layer alone, which is left as it was."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_ru.models.recompute import recompute_parts
from megatron_ru.models.recompute_plan import WHOLE, Cost
from megatron_ru.models.residual import AddThenNorm
from megatron_ru.plugin.step_clock import StepClock

_REPEATS = 5
_SECONDS = 2.0
"""What the repeats may take, all ways together."""


def layer_costs(
    layer: nn.Module,
    forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
    *,
    ways: Sequence[tuple[str, ...]],
    device: str,
    slowest: Callable[[float], float],
) -> tuple[list[Cost], int]:
    """The cost of each way, and the most bytes that a backward pass takes beyond what has waited for it (0 on a CPU,
    where nobody counts them).

    `forward` calls the layer on hidden states, here random numbers in the place of `hidden`; `slowest` gives the
    largest number of the ranks that the layer is divided over. Weights, gradient buffers and random states stay.
    """
    costs: list[Cost] = []
    beyond = [0]

    def measure() -> None:
        hidden.normal_()
        repeats = None
        for way in ways:
            run = _running(layer, forward, way)
            step = partial(_step, run, hidden)
            kept = kept_bytes(partial(_forward, run, hidden))
            # The first time is also for kernels that are loaded or chosen then.
            beyond.append(_peak_bytes(step, device) - kept)
            if repeats is None:
                once = slowest(_seconds(step, 1, device))
                repeats = max(1, min(_REPEATS, int(_SECONDS / (once * len(ways)))))
            costs.append(Cost(way=way, kept=kept, seconds=_seconds(step, repeats, device)))

    with _random_states_kept(device), _by_itself(layer):
        _with_other_parameters(layer, measure)
    return costs, max(beyond)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of each call of `run` for the backward pass of what it gives.

    Each storage counts once, with its size at the end. What two calls share does not count, as weights and rotary
    tables, nor does the result, which is the input of the next layer.
    """
    (result, kept), (_again, shared) = _kept_storages(run), _kept_storages(run)
    own = kept.keys() - shared.keys() - {result.untyped_storage()._cdata}
    return sum(kept[storage].nbytes() for storage in own)


def _kept_storages(run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, Any]]:
    """What `run` gives, and the storages behind it by their identity."""
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> _Held:
        # An output itself would hold the graph that holds it.
        one = _Held(tensor.detach())
        held.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda one: one.tensor):
        result = run()
    # Some parts of the graph are gone by now: nobody uses them.
    storages = [one.tensor.untyped_storage() for one in held]
    return result, {storage._cdata: storage for storage in storages}


class _Held:
    """A tensor for as long as autograd needs it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _running(layer: Any, forward: Callable[[Tensor], Tensor], way: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    recompute_parts(layer, () if way == WHOLE else way)
    if way != WHOLE:
        return forward
    # As Megatron's block does it.
    return partial(tensor_parallel.checkpoint, forward, layer.config.distribute_saved_activations)


def _forward(run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return run(hidden.clone().requires_grad_())


def _step(run: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    torch.autograd.backward(_forward(run, hidden), hidden)


def _seconds(step: Callable[[], None], repeats: int, device: str) -> float:
    clock = StepClock(device)
    for number in range(repeats):
        clock.begin()
        step()
        clock.between()
        clock.end(number)
    return median(time.forward_backward for time in clock.times())


def _peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most that the step takes on a GPU; 0 on a CPU, where nobody counts."""
    if device != "cuda":
        step()
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _with_other_parameters(layer: nn.Module, act: Callable[[], None]) -> None:
    """Calls `act` while the layer has parameters that share the weights alone: Megatron's hooks, which wait for
    gradients and hand them out, do not know them, and gradients are added to buffers that go afterwards."""
    others: dict[str, Tensor] = {f"layer.{name}": _other(parameter) for name, parameter in layer.named_parameters()}
    torch.func.functional_call(_Around(layer, act), others, ())


class _Around(nn.Module):
    def __init__(self, layer: nn.Module, act: Callable[[], None]):
        super().__init__()
        self.layer, self._act = layer, act

    def forward(self) -> None:
        self._act()


def _other(parameter: nn.Parameter) -> nn.Parameter:
    other = nn.Parameter(parameter.detach(), parameter.requires_grad)
    # What Megatron has written on it.
    other.__dict__.update(parameter.__dict__)
    buffer = getattr(parameter, "main_grad", None)
    if buffer is not None:
        other.main_grad = torch.zeros_like(buffer)  # type: ignore[attr-defined]
    return other


@contextmanager
def _by_itself(layer: nn.Module) -> Iterator[None]:
    """Without the norm of the layer that follows; afterwards with it again, and with nothing recomputed."""
    add = getattr(layer, "mlp_bda", None)
    if isinstance(add, AddThenNorm):
        layer.mlp_bda = add.megatron  # type: ignore[assignment]
    try:
        yield
    finally:
        recompute_parts(layer, ())
        if isinstance(add, AddThenNorm):
            layer.mlp_bda = add  # type: ignore[assignment]


@contextmanager
def _random_states_kept(device: str) -> Iterator[None]:
    """Those of torch, and those that Megatron keeps for tensor parallelism."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        try:
            yield
        finally:
            tracker.set_states(states)
