"""torch.compile on the plain forms of our op files."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_ru.benchmarks.peer import Peer, Prepared, UnsupportedError, register
from megatron_ru.ops.op import BenchmarkCase, Call, Op

# The compiler writes out a loop over tensors; beyond this many it takes minutes.
_MOST_TENSORS = 16


def prepare(op: Op, case: BenchmarkCase, call: Call) -> Prepared:
    """The plain form, compiled for this very shape."""
    if len(call.tensors()) > _MOST_TENSORS:
        raise UnsupportedError(f"takes minutes to compile a step over {len(call.tensors())} tensors")
    function = _compiled(op.plain)
    return Prepared(run=lambda: call.run(function), leaves=tuple(call.leaves()))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


register(
    Peer(
        name="compile",
        title="torch.compile",
        module="torch",
        distribution="torch",
        summary="torch.compile (dynamic=False) on plain torch",
        fallback=prepare,
        needs_cuda=False,
        compiles=True,
    )
)
