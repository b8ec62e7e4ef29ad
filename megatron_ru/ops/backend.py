"""Which form of an op runs: the compiled one where the op is switched on and can take the tensor, else plain torch.

select("rms_norm,rope")     `--ru-ops`: these ops; "all" (from the start) and "none" are words too
SWITCH = switch("rope")     in the op's file
SWITCH.takes(x)             on the way into the op
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.ops import library

log = logging.getLogger(__name__)

_NARROW = frozenset((torch.float32, torch.float16, torch.bfloat16))
_WIDE = _NARROW | {torch.float64}

# Loaded with this module: a tensor's way into an op must not begin with a search for files.
_LIBRARY = library.load()
_LOADED = _LIBRARY.path is not None

_switches: dict[str, "Switch"] = {}
_chosen: frozenset[str] | None = None


class Switch:
    """Whether one op may use its compiled form; `switch` makes one for each name."""

    __slots__ = ("_told", "name", "on")

    def __init__(self, name: str, on: bool) -> None:
        self.name = name
        self.on = on
        self._told: set[str] = set()

    def takes(self, tensor: Tensor, dtypes: frozenset[torch.dtype] | None = None) -> bool:
        """Whether the compiled form runs on `tensor`: 0.2 µs, because it stands before every call.

        `dtypes` replaces the usual ones: fp32, fp16 and bf16, on the CPU fp64 too.
        """
        if tensor.is_cuda:
            return self.on and tensor.dtype in (dtypes or _NARROW) and _cuda_is_usable()
        return self.on and _LOADED and tensor.is_cpu and tensor.dtype in (dtypes or _WIDE)

    def fell_back(self, tensor: Tensor, reason: str | None = None) -> None:
        """Logs once for each reason why the plain form serves `tensor`, on the first rank; silent when switched off.

        Tensors without data (device "meta") are counted, not computed: nothing is said of them.
        """
        if not self.on or torch.compiler.is_compiling() or tensor.is_meta:
            return
        reason = reason or self.why_not(tensor.device.type, tensor.dtype)
        if reason and reason not in self._told:
            self._told.add(reason)
            level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.DEBUG
            log.log(level, "megatron-ru: op %s runs in plain torch: %s", self.name, reason)

    def why_not(self, device: str, dtype: torch.dtype = torch.float32) -> str:
        """Why tensors of this kind go the plain way, or "" when they do not."""
        if not self.on:
            return "switched off by --ru-ops"
        if _LIBRARY.path is None:
            return _LIBRARY.reason
        if device == "cuda":
            missing = _why_no_cuda()
            if missing:
                return missing
        elif device != "cpu":
            return f"there are kernels for CPU and CUDA, none for {device}"
        known = _NARROW if device == "cuda" else _WIDE
        if dtype not in known:
            return f"{dtype} on {device} has no kernel"
        return ""


def switch(name: str) -> Switch:
    """The switch of that name, the same one each time."""
    if name not in _switches:
        _switches[name] = Switch(name, on=_chosen is None or name in _chosen)
    return _switches[name]


def select(words: str) -> None:
    """Switches on the ops in a comma-separated list, and no others; `all` and `none` are words too.

    Raises UserError for an unknown name, with those that are known.
    """
    global _chosen
    names = frozenset(word.strip() for word in words.split(",") if word.strip())
    everything = known()
    unknown = names - everything - {"all", "none"}
    if unknown or not names:
        found = ", ".join(sorted(unknown)) or "nothing"
        raise UserError(f"--ru-ops names {found}; expected all, none or some of {','.join(sorted(everything))}")
    if len(names) > 1 and names & {"all", "none"}:
        raise UserError(f"--ru-ops {words}: `all` and `none` stand alone; leave the other names out")
    _chosen = everything if names == {"all"} else names - {"none"}
    for name, one in _switches.items():
        one.on = name in _chosen


def selected() -> tuple[str, ...]:
    """The names that are switched on, in alphabetical order."""
    return tuple(sorted(known() if _chosen is None else _chosen))


def known() -> frozenset[str]:
    """Every name that `--ru-ops` takes."""
    # The registry imports the op files, and those import this one.
    from megatron_ru.ops.op import OPS

    return frozenset(op.switch for _, op in OPS.items())


@contextlib.contextmanager
def only(words: str) -> Iterator[None]:
    """`select(words)` for the length of a block."""
    before = ",".join(selected()) or "none"
    select(words)
    try:
        yield
    finally:
        select(before)


def library_status() -> library.LibraryStatus:
    """The compiled library of this process, or why there is none."""
    return _LIBRARY


def _cuda_is_usable() -> bool:
    return not _why_no_cuda()


# Torch's compiler asks at trace time and takes the answer for a constant, which it is. The mark is what
# torch.compiler.assume_constant_result sets; calling that would import the compiler into every process.
_cuda_is_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_no_cuda() -> str:
    """Why no CUDA tensor can be taken, or ""; asked once there is one, so CUDA is initialised already."""
    if _LIBRARY.path is None:
        return _LIBRARY.reason
    if not _LIBRARY.cuda:
        return f"{_LIBRARY.path.name} holds CPU ops alone: run `megatron-ru build --kind cuda`"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    if _LIBRARY.archs and 10 * major + minor < min(_LIBRARY.archs):
        built_for = ", ".join(f"sm_{arch}" for arch in _LIBRARY.archs)
        return (
            f"the GPU is an sm_{major}{minor} and the library was built for {built_for}: "
            f"run `megatron-ru build --kind cuda --archs {major}{minor}`"
        )
    return ""
