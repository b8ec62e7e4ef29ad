"""A library whose ops are timed beside ours, and what it makes of a call."""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_ru.foundation.registry import Registry
from megatron_ru.ops.op import BenchmarkCase, Call, Op


class UnsupportedError(Exception):
    """A library has this op, but not for these arguments; the message says which."""


def _same(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call made ready in the layout that its library likes best."""

    run: Callable[[], Any]
    """The forward; gives what the op's public function gives, in the library's layout."""
    leaves: tuple[Tensor, ...]
    """The tensors whose gradients are asked for, in the order of the call's own leaves."""
    outputs_to_op: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    """The outputs as the op gives them; for comparing, not timed."""
    gradients_to_op: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    """Gradients of the leaves as the op gives them; for comparing, not timed."""
    upstream_from_op: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    """Gradients of the op's outputs as gradients of `run`'s."""


# Gets the arguments of the op's public function by name, all of them.
Adapter = Callable[..., Prepared]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One library."""

    name: str
    """The word of `--against`."""
    title: str
    """Its name in tables."""
    module: str
    """What is imported."""
    distribution: str
    """What pip calls it."""
    summary: str
    adapters: Mapping[str, Mapping[str, Adapter]] = field(default_factory=dict)
    """By the name of our op: the ways in which the library does it, by a word on each; the plain way has none."""
    fallback: Callable[[Op, BenchmarkCase, Call], Prepared] | None = None
    """For ops without an adapter."""
    needs_cuda: bool = True
    compiles: bool = False
    """Whether it compiles anew for every case, which takes longer than all else: it comes last in a case."""

    def missing(self, device: str) -> str:
        """Why it takes no part, or ""."""
        if self.needs_cuda and device != "cuda":
            return f"has no ops for {device}"
        if not _exists(self.module):
            return "not installed"
        try:
            importlib.import_module(self.module)
        except Exception as error:
            # Anything may happen while somebody else's package is imported; it must not end the run.
            return f"cannot be imported: {one_line(error)}"
        return ""

    def version(self) -> str:
        """Its version, or "" when its package tells none."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def variants(self, op: Op) -> tuple[str, ...]:
        """The ways in which it does an op; none when it has no such op."""
        if op.name in self.adapters:
            return tuple(self.adapters[op.name])
        return ("",) if self.fallback is not None else ()

    def contender(self, variant: str) -> str:
        """Its name in tables, with the word on the way."""
        return f"{self.title}, {variant}" if variant else self.title

    def prepare(self, op: Op, case: BenchmarkCase, call: Call, variant: str = "") -> Prepared:
        """The call, ready to run; raises UnsupportedError, or whatever the library raises."""
        if op.name in self.adapters:
            return self.adapters[op.name][variant](**bound(op, call))
        assert self.fallback is not None
        return self.fallback(op, case, call)


PEERS: Registry[Peer] = Registry("peer", package="megatron_ru.benchmarks.peers")


def register(peer: Peer) -> Peer:
    """Adds a library to `PEERS` under its name."""
    return PEERS.register(peer.name)(peer)


def bound(op: Op, call: Call) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of the op's public function."""
    arguments = inspect.signature(op.function).bind(*call.arguments, **call.keywords)
    arguments.apply_defaults()
    return dict(arguments.arguments)


def only_default(**given: Any) -> None:
    """Raises UnsupportedError for a setting that is neither None, False nor 0: the library has nothing like it."""
    for name, value in given.items():
        if isinstance(value, Tensor) or (value is not None and value != 0):
            raise UnsupportedError(f"has no {name.replace('_', ' ')}")


def leaves_of(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that require gradients."""
    return tuple(tensor for tensor in tensors if tensor is not None and tensor.requires_grad)


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # Its parent package is not there.
        return False
