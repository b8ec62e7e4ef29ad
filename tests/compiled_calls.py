"""Which compiled ops a piece of code really calls."""

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ru.ops import backend

needs_library = pytest.mark.skipif(
    backend.library_status().path is None, reason=f"no compiled ops: {backend.library_status().reason}"
)


class CompiledCalls(TorchDispatchMode):
    """`calls` holds how often each operator of the namespace megatron_ru ran inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "megatron_ru":
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))
