"""Megatron's optimizer step in one pass over the parameters: clipping and the copies to the model happen inside AdamW.

Without Apex and TransformerEngine Megatron scales each gradient in a pass of its own, twice through memory, steps, and
then reads all main parameters again to round them into the model's. On an H200 that is half of the step.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ru.ops.adamw import FusedAdamW
from megatron_ru.seams.seam import Seam

_HALF = (torch.bfloat16, torch.float16)
_UP_TO_FP32 = (*_HALF, torch.float32)


class MegatronAdamW(FusedAdamW):
    """The AdamW that Megatron builds; it can be found by its parameters."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.stepped = False
        """Whether a step was made that nobody has followed with copies."""
        _built.add(self)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As FusedAdamW's."""
        result = super().step(closure)
        self.stepped = True
        return result


_built: "weakref.WeakSet[MegatronAdamW]" = weakref.WeakSet()


def optimizer_step_seams() -> list[Seam]:
    """Seams on the clipping of gradients and on the copies of parameters, for optimizers that step `MegatronAdamW`."""
    module = "megatron.core.optimizer"
    clipping = "Megatron scales the gradients in a pass of its own"
    copies = "Megatron rounds the main parameters into the model's in a pass of its own"
    return [
        Seam(
            target=f"{module}.optimizer:clip_grad_by_total_norm_fp32",
            make=_clip_in_step,
            expects=("parameters", "max_norm", "total_norm"),
            reason=clipping,
        ),
        Seam(
            target=f"{module}.clip_grads:l2_norm_impl",
            make=_norm_without_waiting,
            reason="without Apex and TransformerEngine the host fetches the norm of each gradient by itself",
        ),
        Seam(
            target=f"{module}.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params",
            make=_copy_in_step,
            expects=("self",),
            reason=copies,
        ),
        Seam(
            target=f"{module}.optimizer:Float16OptimizerWithFloat16Params._copy_main_params_to_model_params",
            make=_copy_in_step,
            expects=("self",),
            reason=copies,
        ),
    ]


def _norm_without_waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    if not str(getattr(original, "__name__", "")).startswith("local_"):
        return original

    def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: Any, per_tensor: bool, *others: Any) -> Any:
        tensors = tensor_lists[0]
        one_list = len(tensor_lists) == 1 and len({tensor.device for tensor in tensors}) == 1
        if per_tensor or not one_list or any(tensor.dtype not in _UP_TO_FP32 for tensor in tensors):
            return original(chunk_size, noop_flag, tensor_lists, per_tensor, *others)
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
        return torch.linalg.vector_norm(norms, dtype=torch.float32).reshape(1), None

    return l2_norm


def _clip_in_step(original: Callable[..., None]) -> Callable[..., None]:
    def clip(parameters: Any, max_norm: float, total_norm: Any, *others: Any, **keywords: Any) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        asked = any(others) or any(keywords.values())
        optimizer = None if asked else _optimizer_of(parameters)
        if optimizer is None:
            _widen_gradients(parameters)
            original(parameters, max_norm, total_norm, *others, **keywords)
            return
        # Megatron's own formula, in fp32 on the host too, where the norm comes as a number before 0.19: the same losses
        # in every version.
        norm = total_norm if isinstance(total_norm, Tensor) else torch.tensor(total_norm, dtype=torch.float32)
        optimizer.scale_next_gradients((max_norm / (norm + 1.0e-6)).clamp(max=1.0))

    return clip


def _optimizer_of(parameters: Sequence[Tensor]) -> MegatronAdamW | None:
    """The optimizer that steps just these, or None: a part of its parameters cannot be clipped by a factor of all."""
    wanted = _with_gradients(parameters)
    for optimizer in _built:
        if wanted and wanted == _with_gradients(p for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return None


def _widen_gradients(parameters: Iterable[Tensor]) -> None:
    """Half-precision gradients of fp32 parameters become fp32: Megatron scales them where they lie, and no others."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.dtype is torch.float32 and parameter.grad.dtype in _HALF:
            parameter.grad = parameter.grad.float()


def _with_gradients(parameters: Iterable[Tensor]) -> set[int]:
    return {id(parameter) for parameter in parameters if parameter.grad is not None}


class _Copies(NamedTuple):
    """What Megatron's pass of copies did when it was watched."""

    addresses: tuple[int, ...]
    """Where the model's parameters lay."""
    in_step: bool
    """Whether everything it did was copying."""
    rest: list[tuple[Tensor, Tensor]]
    """(to, from) of copies that AdamW does not make: those in fp32."""


def _copy_in_step(original: Callable[[Any], None]) -> Callable[[Any], None]:
    known: weakref.WeakKeyDictionary[Any, _Copies] = weakref.WeakKeyDictionary()

    def copy(self: Any) -> None:
        optimizer = getattr(self, "optimizer", None)
        if not isinstance(optimizer, MegatronAdamW):
            original(self)
            return
        stepped, optimizer.stepped = optimizer.stepped, False
        addresses = _addresses(self)
        copies = known.get(self)
        if copies is None or copies.addresses != addresses:
            # Which main parameter goes where is told by watching Megatron, whose bookkeeping differs between versions.
            with _WatchedCopies() as watched:
                original(self)
            known[self] = _let_step_copy(optimizer, addresses, watched)
        elif not stepped or not copies.in_step:
            original(self)
        else:
            for to, source in copies.rest:
                to.copy_(source)

    return copy


def _addresses(optimizer: Any) -> tuple[int, ...]:
    groups = getattr(optimizer, "model_float16_groups", None) or getattr(optimizer, "float16_groups", ())
    return tuple(parameter.data_ptr() for group in groups for parameter in group)


def _let_step_copy(optimizer: MegatronAdamW, addresses: tuple[int, ...], watched: "_WatchedCopies") -> _Copies:
    mains = {(p.data_ptr(), p.numel()): p for group in optimizer.param_groups for p in group["params"]}
    in_step: dict[Tensor, Tensor] = {}
    rest = []
    for to, source in watched.pairs:
        main = mains.get((source.data_ptr(), source.numel()))
        if main is not None and main not in in_step and to.dtype in _HALF and to.is_contiguous():
            in_step[main] = to.view(main.shape)
        else:
            rest.append((to, source))
    if watched.did_more:
        in_step = {}
    optimizer.write_copies_to(in_step)
    return _Copies(addresses, not watched.did_more, rest)


class _WatchedCopies(TorchDispatchMode):
    """Notes what is copied where, and whether anything else is done than copying and looking."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.did_more = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.pairs.append((args[0], args[1]))
        elif func is torch.ops.aten._foreach_copy_.default:
            self.pairs += zip(args[0], args[1], strict=True)
        elif not func.is_view and func is not torch.ops.aten.detach.default:
            self.did_more = True
        return func(*args, **(kwargs or {}))
