"""Megatron-Core on the CPU: what its training loop asks of CUDA, answered by the CPU.

Megatron asks `torch.cuda` for a device, streams, events, memory figures and random states, and creates tensors
on "cuda". `CpuDevice.install()` answers these on a machine without a GPU, `undo()` takes everything back. Tensors
then live in main memory and collectives go over gloo. Streams are meaningless here: work is done when the call
returns, so every wait is already over.

The table `REPLACEMENTS` is the whole of it, one line per name; `DeviceToCpu` redirects devices in torch calls.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.seam import Seam


class CpuDevice:
    """The installed layer; `install` and `undo` are idempotent, one instance per process (`CPU_DEVICE`)."""

    def __init__(self) -> None:
        self._seams: list[Seam] = []
        self._mode: DeviceToCpu | None = None
        self._environment: dict[str, str | None] = {}

    @property
    def installed(self) -> bool:
        """Whether torch calls meant for CUDA reach the CPU now."""
        return self._mode is not None

    def install(self) -> None:
        """Installs the layer in this process and thread; raises `UserError` when a GPU is in use."""
        if self.installed:
            return
        if torch.cuda.is_initialized():
            raise UserError(
                "the CPU device layer cannot be installed: CUDA is already initialised in this process; choose the "
                "device before anything touches the GPU (--device cpu, or CUDA_VISIBLE_DEVICES= in the environment)"
            )
        self._set_environment("TORCHDYNAMO_DISABLE", "1")
        self._set_environment("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for name, (value, reason) in REPLACEMENTS.items():
            seam = Seam(target=name, make=lambda _, value=value: _own_object(value), reason=reason, optional=True)
            if seam.install():
                self._seams.append(seam)
        self._mode = DeviceToCpu()
        self._mode.__enter__()
        logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_no_shared_generator_warning)

    def install_in_megatron(self) -> None:
        """Replaces the random-state functions that megatron-core keeps for itself; call it once core is imported."""
        for seam in megatron_seams():
            seam.install()
            self._seams.append(seam)

    def undo(self) -> None:
        """Takes everything back."""
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)
        self._mode = None
        for seam in reversed(self._seams):
            seam.undo()
        self._seams.clear()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()
        logging.getLogger("megatron.core.tensor_parallel.random").removeFilter(_no_shared_generator_warning)

    def _set_environment(self, name: str, value: str) -> None:
        self._environment[name] = os.environ.get(name)
        os.environ.setdefault(name, value)


def megatron_seams() -> list[Seam]:
    """The two functions with which megatron-core reads and writes the random state of "the GPU"."""
    return [
        Seam(
            target="megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            make=lambda _: lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
            expects=("device", "clone", "graph_safe"),
            reason="the random state tracker of tensor parallelism lives in the CPU's generator here",
        ),
        Seam(
            target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
            make=lambda _: lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
            expects=("new_state", "device", "graph_safe"),
            reason="the random state tracker of tensor parallelism lives in the CPU's generator here",
        ),
    ]


class DeviceToCpu(TorchFunctionMode):
    """Sends torch calls that name CUDA to the CPU.

    `device="cuda"`, `.to("cuda")` and `.cuda()` mean the CPU; `pin_memory` is dropped; `tensor.type()` still answers
    `torch.cuda.FloatTensor`, because the optimizer and gradient clipping of megatron-core compare that string.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.backward:
            tensor, *rest = args
            names = ("gradient", "retain_graph", "create_graph", "inputs")
            given = dict(zip(names, rest, strict=False)) | kwargs
            if self._backward([tensor], [given.pop("gradient", None)], **given):
                return None
        elif func is torch.autograd.backward:
            names = ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")
            given = dict(zip(names, args, strict=False)) | kwargs
            tensors, gradients = _sequence(given.pop("tensors")), _sequence(given.pop("grad_tensors", None))
            if given.pop("grad_variables", None) is None and self._backward(tensors, gradients, **given):
                return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.type:
            args, kwargs = tuple(map(_on_cpu_type, args)), {k: _on_cpu_type(v) for k, v in kwargs.items()}
        elif func is torch.Tensor.to:
            args = tuple(map(_on_cpu, args))
        device = kwargs.get("device")
        if device is not None:
            kwargs = {**kwargs, "device": _on_cpu(device)}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)

    def _backward(
        self, tensors: Sequence[Any], gradients: Sequence[Any], retain_graph: bool | None = None,
        create_graph: bool = False, inputs: Any = None,
    ) -> bool:  # fmt: skip
        """A backward pass inside the mode, which is off while it answers, though backward passes create tensors too.
        False, and nothing is done, for what torch itself refuses or does otherwise."""
        gradients = gradients or [None] * len(tensors)
        starts = []
        for tensor, gradient in zip(tensors, gradients, strict=False):
            if not isinstance(tensor, torch.Tensor) or (gradient is None and tensor.numel() != 1):
                return False
            starts.append(torch.ones_like(tensor) if gradient is None else gradient)
        if not starts or len(starts) != len(tensors):
            return False
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            # Where torch's own functions end; before that they would come back here.
            torch.autograd.Variable._execution_engine.run_backward(
                tuple(tensors), tuple(starts), keep, create_graph, _sequence(inputs), allow_unreachable=True,
                accumulate_grad=True,
            )  # fmt: skip
        return True


def _sequence(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _on_cpu(value: Any) -> Any:
    """`value`, or the CPU when it names a CUDA device (an index, a string or a `torch.device`)."""
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str):
        return _CPU if value.startswith("cuda") else value
    if type(value) is int:
        return _CPU
    return value


def _on_cpu_type(value: Any) -> Any:
    """`value`, or the CPU's tensor type when it is the name of a CUDA one."""
    return value.replace("torch.cuda.", "torch.") if isinstance(value, str) else value


class NullStream:
    """A stream whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.stream_id = 0
        self.device = _CPU

    def __enter__(self) -> "NullStream":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: "NullEvent | None" = None) -> "NullEvent":
        """An event that has already happened."""
        event = event or NullEvent()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """One priority."""
        return (0, 0)


class NullEvent:
    """An event that has happened as soon as it is recorded; it remembers when."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Remembers the time."""
        import time

        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: "NullEvent") -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3


class _NullDevice(contextlib.nullcontext[None]):
    """`with torch.cuda.device(i):` and `with torch.cuda.stream(s):` change nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _own_object(value: Any) -> Any:
    """`value`, or a copy of it if it is a function: torch's compiler files functions by identity and refuses one
    that stands under two names with different rules."""
    if not isinstance(value, FunctionType):
        return value
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__)
    copy.__kwdefaults__ = value.__kwdefaults__
    return copy


def _not_compiled(model: Any = None, **options: Any) -> Any:
    """`torch.compile` as a decorator, with or without options, that leaves the function as it is."""
    return model if model is not None else lambda function: function


def _device_count() -> int:
    """Ranks of this host: each has "its" device, as Megatron's `local_rank` expects."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _current_device() -> int:
    return 0


def _device_properties(device: Any = None) -> SimpleNamespace:
    memory = psutil.virtual_memory().total
    return SimpleNamespace(
        name="CPU", major=8, minor=0, total_memory=memory, multi_processor_count=torch.get_num_threads(),
        uuid="cpu", L2_cache_size=0, warp_size=32,
    )  # fmt: skip


def _resident_bytes(device: Any = None) -> int:
    return int(psutil.Process().memory_info().rss)


def _memory_stats(device: Any = None) -> dict[str, int]:
    return dict.fromkeys(
        ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current",
         "reserved_bytes.all.peak", "allocation.all.current", "num_alloc_retries", "num_ooms"),
        0,
    ) | {"allocated_bytes.all.current": _resident_bytes()}  # fmt: skip


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which seeds "the GPUs" too and would come back here.
    torch.default_generator.manual_seed(int(seed))


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(state)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _same_module(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    return module


class _NoSharedGeneratorWarning(logging.Filter):
    """Megatron warns when the CPU generator moves inside a fork of the GPU's; here they are one on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


_CPU = torch.device("cpu")
_STREAM = threading.local()
_no_shared_generator_warning = _NoSharedGeneratorWarning()


def _current_stream(device: Any = None) -> NullStream:
    if not hasattr(_STREAM, "value"):
        _STREAM.value = NullStream()
    return _STREAM.value


_DEVICE = "megatron-core initialises its groups only when a CUDA device is there"
_ACCELERATOR = "torch itself must not send work or pinned memory to a CUDA device that is not there"
_STREAMS = "megatron-core orders its work with CUDA streams and events"
_MEMORY = "megatron-core reports and checks device memory"
_RANDOM = "megatron-core seeds, saves and restores the device's random state"

REPLACEMENTS: dict[str, tuple[Any, str]] = {
    "torch.cuda:is_available": (lambda: True, _DEVICE),
    "torch.cuda:device_count": (_device_count, _DEVICE),
    "torch.cuda:set_device": (_nothing, _DEVICE),
    "torch.cuda:current_device": (_current_device, _DEVICE),
    "torch.cuda:get_device_properties": (_device_properties, _DEVICE),
    "torch.cuda:get_device_capability": (lambda device=None: (8, 0), _DEVICE),
    "torch.cuda:get_device_name": (lambda device=None: "CPU", _DEVICE),
    "torch.cuda:device": (_NullDevice, _DEVICE),
    "torch.cuda:_lazy_init": (_nothing, _DEVICE),
    "torch.nn:Module.cuda": (_same_module, _DEVICE),
    "torch.accelerator:is_available": (lambda: False, _ACCELERATOR),
    "torch.accelerator:current_accelerator": (lambda check_available=False: None, _ACCELERATOR),
    "torch:compile": (_not_compiled, "compiling for two laptop cores costs minutes and gains nothing"),
    "torch.cuda:synchronize": (_nothing, _STREAMS),
    "torch.cuda:Stream": (NullStream, _STREAMS),
    "torch.cuda:Event": (NullEvent, _STREAMS),
    "torch.cuda:stream": (_NullDevice, _STREAMS),
    "torch.cuda:set_stream": (_nothing, _STREAMS),
    "torch.cuda:current_stream": (_current_stream, _STREAMS),
    "torch.cuda:default_stream": (_current_stream, _STREAMS),
    "torch.cuda:is_current_stream_capturing": (lambda: False, _STREAMS),
    "torch.cuda.nvtx:range_push": (_nothing, _STREAMS),
    "torch.cuda.nvtx:range_pop": (_nothing, _STREAMS),
    "torch.cuda:empty_cache": (_nothing, _MEMORY),
    "torch.cuda:memory_allocated": (_resident_bytes, _MEMORY),
    "torch.cuda:memory_reserved": (_resident_bytes, _MEMORY),
    "torch.cuda:max_memory_allocated": (_resident_bytes, _MEMORY),
    "torch.cuda:max_memory_reserved": (_resident_bytes, _MEMORY),
    "torch.cuda:device_memory_used": (_resident_bytes, _MEMORY),
    "torch.cuda:memory_stats": (_memory_stats, _MEMORY),
    "torch.cuda:reset_peak_memory_stats": (_nothing, _MEMORY),
    "torch.cuda:mem_get_info": (lambda device=None: (psutil.virtual_memory().available,
                                                     psutil.virtual_memory().total), _MEMORY),
    "torch.cuda:manual_seed": (_manual_seed, _RANDOM),
    "torch.cuda:manual_seed_all": (_manual_seed, _RANDOM),
    "torch.cuda:get_rng_state": (_get_rng_state, _RANDOM),
    "torch.cuda:set_rng_state": (_set_rng_state, _RANDOM),
    "torch.cuda.random:get_rng_state": (_get_rng_state, _RANDOM),
    "torch.cuda.random:set_rng_state": (_set_rng_state, _RANDOM),
}  # fmt: skip

CPU_DEVICE = CpuDevice()
