"""Other implementations of the same model, as things that can be trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_ru.benchmarks.training.task import Task
from megatron_ru.foundation.registry import Registry
from megatron_ru.models.step_flops import Shape
from megatron_ru.models.variant import Variant


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model on the device in its dtype, and how its loss is computed."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    """The mean loss [] of tokens and their targets, both int64 [batch, sequence], with a graph behind it."""


@dataclass(frozen=True, kw_only=True)
class TrainingPeer:
    """One of them."""

    name: str
    """The word for `--against`."""
    title: str
    """In tables."""
    missing: Callable[[str], str]
    """Why it cannot run on a device, `cuda` or `cpu`; empty when it can."""
    build: Callable[[Variant, Shape, str], Built] | None = None
    """The model in bf16, whose embedding has the padded rows of the shape; it is trained by `loop`."""
    measure: Callable[[Task, Shape], dict[str, Any]] | None = None
    """In the place of `build`: measures by itself and gives the document."""
    distributions: tuple[str, ...] = ()
    """Whose versions are told."""


def register(peer: TrainingPeer) -> TrainingPeer:
    """Makes the peer known by its name."""
    return TRAINING_PEERS.register(peer.name)(peer)


TRAINING_PEERS: Registry[TrainingPeer] = Registry("training peer", package="megatron_ru.benchmarks.training.peers")
