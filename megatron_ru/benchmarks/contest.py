"""One contender in one case: forward, backward and both are timed, and the results looked at."""

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ru.benchmarks.accuracy import Exact, accuracy, differentiable_outputs, exact_results, heads_and_upstream
from megatron_ru.benchmarks.peer import Prepared, UnsupportedError, one_line
from megatron_ru.benchmarks.result import Row
from megatron_ru.benchmarks.timing import Clock, GraphClock, QueuedClock, Step, host_microseconds
from megatron_ru.ops.op import BenchmarkCase, Call, Op, outputs

# Input sets together are at least this many times the cache; more than the most would only take memory.
_CACHES = 4
_MOST_SETS = 12
# What graphs that wait for their backward may hold.
_GRAPH_BYTES = 12 * 2**30

# What autograd says of a graph whose saved input has been written over since.
_WRITTEN_OVER = "modified by an inplace operation"
_ONE_GRAPH = "one graph for each input set, since a backward writes over it"

# Makes a contender's call of the op's.
Prepare = Callable[[Call], Prepared]


class SharedInputError(Exception):
    """A contender's backward writes over its input, so that no second graph may stand on the same one."""


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What is the same for all contenders of a case."""

    op: Op
    case: BenchmarkCase
    dtype: torch.dtype
    device: str
    clock: Clock
    seconds: float
    """For timing, of each contender."""
    cache_bytes: int
    call: Call
    exact: Exact | None
    """None where it does not fit into memory."""
    differentiable: tuple[int, ...]
    one_graph: bool = False
    """Whether no input set has more than one graph at a time, and each is as it was before the first: for cases in
    which somebody's backward writes over its input. It holds for all contenders of a case."""

    def row(self, contender: str, **values: Any) -> Row:
        """A row of this case."""
        forward, backward = self.case.bytes_moved(self.dtype)
        return Row(
            op=self.op.name,
            case=self.case.label,
            dtype=str(self.dtype).removeprefix("torch."),
            contender=contender,
            bytes_forward=forward,
            bytes_backward=backward,
            flops=self.case.flops,
            **values,
        )


def arena(
    op: Op, case: BenchmarkCase, dtype: torch.dtype, device: str, clock: Clock, seconds: float, cache_bytes: int
) -> Arena:
    """The inputs of a case and its exact results."""
    call = case.make(device, dtype)
    trial = call.copy()
    differentiable = differentiable_outputs(op, trial, trial.run(case.function or op.function))
    del trial
    exact = None
    # The reference changes its copies where an op works in place; `double` makes copies.
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        exact = exact_results(op, call, dtype, differentiable)
    tidy(device)
    return Arena(
        op=op, case=case, dtype=dtype, device=device, clock=clock, seconds=seconds, cache_bytes=cache_bytes,
        call=call, exact=exact, differentiable=differentiable,
    )  # fmt: skip


def compete(place: Arena, contender: str, prepare: Prepare, *, measure_host: bool = False) -> Row:
    """The row of one contender; whatever it raises is its note.

    Raises SharedInputError when the case has to be timed with `one_graph`, all contenders of it.
    """
    try:
        return _compete(place, contender, prepare, measure_host)
    except SharedInputError:
        raise
    except UnsupportedError as error:
        return place.row(contender, status="unsupported", note=str(error))
    except Exception as error:
        # Somebody else's library may raise anything, and the run goes on.
        return place.row(contender, status="failed", note=one_line(error))
    finally:
        tidy(place.device)


def _compete(place: Arena, contender: str, prepare: Prepare, measure_host: bool) -> Row:
    found = None
    note = ""
    if place.exact is None:
        note = "not compared: the float64 results do not fit into memory"
    else:
        call = place.call.copy()
        found = accuracy(place.op, call, prepare(call), place.exact)
        del call
        if not found.good:
            note = "wrong beyond what its op and dtypes account for; not compared with"
    if place.one_graph:
        note = "; ".join(filter(None, (note, _ONE_GRAPH)))
    sets = _InputSets(place, prepare)
    if place.differentiable and not place.one_graph:
        sets.try_two_graphs()
    extra = sets.extra_bytes()
    host = None
    if measure_host and place.device == "cuda":
        host = host_microseconds(sets.prepared[0].run)
    clock = place.clock
    try:
        timings = _timings(clock, place, sets)
    except RuntimeError as error:
        if not isinstance(clock, GraphClock):
            raise
        # Something in it waits for the GPU, or makes memory of its own.
        note = "; ".join(filter(None, (note, f"not as a graph: {one_line(error)}")))
        clock = QueuedClock()
        torch.cuda.synchronize()
        timings = _timings(clock, place, sets)
    row = place.row(
        contender, status="ok", note=note, timed=clock.name, accuracy=found, host_microseconds=host, extra_bytes=extra
    )
    return replace(row, **timings)


def _timings(clock: Clock, place: Arena, sets: "_InputSets") -> dict[str, Any]:
    if not place.differentiable:
        return {"forward": clock.measure(_InTurn(sets, sets.forward), place.seconds)}
    return {
        "forward": clock.measure(_InTurn(sets, sets.forward), 0.3 * place.seconds),
        "backward": clock.measure(_Backward(sets), 0.3 * place.seconds),
        "both": clock.measure(_InTurn(sets, sets.forward_and_backward), 0.4 * place.seconds),
    }


def input_sets(cache_bytes: int, bytes_of_one: int) -> int:
    """How many sets of inputs to go through in turn."""
    return min(2 + _CACHES * cache_bytes // bytes_of_one, _MOST_SETS)


class _InputSets:
    """Copies of a call, so many that the cache holds no part of one until its turn comes again."""

    def __init__(self, place: Arena, prepare: Prepare) -> None:
        self.place = place
        forward, backward = place.case.bytes_moved(place.dtype)
        self.bytes = max(forward, 1)
        self.rotation = input_sets(place.cache_bytes, self.bytes)
        self.calls = [place.call.copy() for _ in range(self.rotation)]
        self.prepared = [prepare(call) for call in self.calls]
        # Results stay until their set's turn comes again: memory handed back at once would stay in the cache.
        self.kept: deque[object] = deque(maxlen=self.rotation)
        leaves = self.prepared[0].leaves if place.one_graph else ()
        self.unspoiled = [leaf.detach().clone() for leaf in leaves]
        raw = self.prepared[0].run()
        self.upstream = self._upstream(raw)
        self.most_graphs = max(self.rotation, 2, _GRAPH_BYTES // max(self.bytes, backward))
        if place.one_graph:
            self.most_graphs = self.rotation

    def in_turn(self, count: int) -> Iterator[int]:
        """The numbers of `count` sets."""
        return (number % self.rotation for number in range(count))

    def try_two_graphs(self) -> None:
        """Raises SharedInputError when autograd refuses the second of two graphs that stand on one set."""
        graphs = [self.prepared[0].run() for _ in range(2)]
        try:
            for raw in graphs:
                self.gradients(0, raw)
        except RuntimeError as error:
            if _WRITTEN_OVER not in str(error):
                raise
            raise SharedInputError(one_line(error)) from error

    def restore(self) -> None:
        """Puts the inputs back where they are written over; otherwise they would shrink from call to call, and zeros
        cost a GPU less power."""
        if not self.unspoiled:
            return
        with torch.no_grad():
            for prepared in self.prepared:
                for leaf, value in zip(prepared.leaves, self.unspoiled, strict=True):
                    leaf.copy_(value)

    def forward(self, number: int) -> object:
        """The results of a set."""
        return self.prepared[number].run()

    def forward_and_backward(self, number: int) -> tuple[Tensor, ...]:
        """The gradients of a set, from the beginning."""
        return self.gradients(number, self.forward(number))

    def gradients(self, number: int, raw: object) -> tuple[Tensor, ...]:
        """Of the leaves of a set."""
        heads = [tensor for tensor in outputs(self.calls[number], raw) if tensor.requires_grad]
        return torch.autograd.grad(heads, self.prepared[number].leaves, self.upstream[number])

    def extra_bytes(self) -> int | None:
        """Most memory in use during forward and backward, beyond arguments, outputs and gradients."""
        if self.place.device != "cuda":
            return None
        self.kept.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        raw = self.prepared[0].run()
        results: tuple[Tensor, ...] = outputs(self.calls[0], raw)
        if self.place.differentiable:
            results += self.gradients(0, raw)
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in results)
        return max(0, int(beyond))

    def _upstream(self, raw: object) -> list[list[Tensor]]:
        """What comes from above, for each set its own."""
        if not self.place.differentiable:
            return [[] for _ in range(self.rotation)]
        if self.place.exact is not None:
            return [
                heads_and_upstream(self.calls[number], raw, self.prepared[number], self.place.exact)[1]
                for number in range(self.rotation)
            ]
        heads = [tensor for tensor in outputs(self.calls[0], raw) if tensor.requires_grad]
        return [[_random_like(head) for head in heads] for _ in range(self.rotation)]


class _InTurn:
    """One act after another, set after set; `act` takes the number of a set, and its results are kept."""

    def __init__(self, sets: _InputSets, act: Callable[[int], object]) -> None:
        self._sets = sets
        self._act = act
        self.rotation = sets.rotation
        self.most = 10**6

    def steps(self, count: int) -> Sequence[Step]:
        sets = self._sets
        sets.restore()

        def step(number: int) -> Step:
            return lambda: sets.kept.append(self._act(number))

        return [step(number) for number in sets.in_turn(count)]


class _Backward:
    """Backwards of graphs that were made before the clock starts, each run once: some ops can do no more."""

    def __init__(self, sets: _InputSets) -> None:
        self._sets = sets
        self.rotation = sets.rotation
        self.most = sets.most_graphs

    def steps(self, count: int) -> Sequence[Step]:
        sets = self._sets
        sets.kept.clear()
        sets.restore()
        graphs: list[object] = [sets.prepared[number].run() for number in sets.in_turn(count)]

        def step(place: int, number: int) -> Step:
            def run() -> None:
                raw, graphs[place] = graphs[place], None
                sets.kept.append(sets.gradients(number, raw))

            return run

        return [step(place, number) for place, number in enumerate(sets.in_turn(count))]


def _random_like(head: Tensor) -> Tensor:
    return torch.ones_like(head) if head.dim() == 0 else torch.randn_like(head)


def tidy(device: str) -> None:
    """Frees what nobody refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
