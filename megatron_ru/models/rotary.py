"""Cosines and sines for the op `rope`, from the angles that Megatron hands to its attention.

Megatron computes the angles once and gives the same tensor to every layer, whose plain rotation takes their cosine and
sine anew each time. Here they are taken once: the last few tensors of angles are kept with their tables.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ru.ops.rope import rope_table

_KEPT = 4
"""Training has one tensor of angles; validation, or a batch of other lengths, adds a few."""

_ROTATED = frozenset((torch.float32, torch.bfloat16, torch.float16))


def rotary_tables(angles: Tensor, *, interleaved: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cosines, sines) [sequence, rotary/2] fp32, both times `scale`, of Megatron's angles [sequence, 1, 1, rotary].

    Megatron holds each angle twice: in both halves of the last dimension, or side by side when `interleaved`. The same
    angles give the same tensors, also through the detached copies that activation recomputation makes of them.
    """
    if torch.compiler.is_compiling():
        return rope_table(angles, interleaved=interleaved, scale=scale)
    version = None if angles.is_inference() else angles._version
    capturing = angles.is_cuda and torch.cuda.is_current_stream_capturing()
    # Every layer comes with the same object: then nothing else is asked for.
    if angles is _latest.angles and _latest.asked == (version, interleaved, scale) and not capturing:
        return _latest.tables
    # An entry keeps its angles alive, so that no other tensor can come to lie at their address.
    key = (angles.data_ptr(), angles.shape, angles.stride(), angles.device, version, interleaved, scale)
    found = _captured.get(key) or _recent.get(key)
    if found is None:
        # A table made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            tables = rope_table(angles, interleaved=interleaved, scale=scale)
        if capturing:
            # What a CUDA graph computes is there when the graph is run, not before.
            return tables
        found = _recent[key] = _Entry(angles, (version, interleaved, scale), tables)
        if len(_recent) > _KEPT:
            _recent.popitem(last=False)
    elif key in _recent:
        _recent.move_to_end(key)
    if capturing:
        # The graph will read these addresses whenever it is run.
        _captured[key] = found
    else:
        _remember(_Entry(angles, found.asked, found.tables))
    return found.tables


def rotates(t: Tensor, angles: Tensor) -> bool:
    """Whether `t` [sequence, batch, heads, head_dim] and its angles are what the op `rope` is made for: one angle for
    each position and pair of channels, the same for every sequence of the batch and every head."""
    if t.dim() != 4 or angles.dim() != 4:
        return False
    sequence, batch, heads, rotary = angles.shape
    return (
        batch == heads == 1
        and sequence == t.shape[0]
        and rotary <= t.shape[3]
        and t.dtype in _ROTATED
        and angles.dtype is torch.float32
        and t.stride(3) == 1
        and not angles.requires_grad
    )


def forget_tables() -> None:
    """Lets go of every kept tensor that no CUDA graph reads."""
    _recent.clear()
    _remember(_NOTHING)


class _Entry(NamedTuple):
    angles: Tensor | None
    asked: tuple[object, ...]
    """Version of the angles, interleaved, scale."""
    tables: tuple[Tensor, Tensor]


def _remember(entry: _Entry) -> None:
    global _latest
    _latest = entry


_NOTHING = _Entry(None, (), (torch.empty(0), torch.empty(0)))
_latest = _NOTHING
_recent: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
_captured: dict[tuple[object, ...], _Entry] = {}
