"""What was measured over several nodes, before anybody judges it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ru.doctor.finding import Finding
from megatron_ru.doctor.nodes import Node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a node says of itself."""

    versions: Mapping[str, str]
    gpus: int
    """How many torch sees."""
    gpu: str
    """Name of the first, empty without any."""
    loopback: bool
    """Whether the host's own name stands for an address of its loopback."""
    findings: tuple[Finding, ...]

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "Description":
        """The description in an answer of the worker."""
        findings = tuple(Finding.read(finding) for finding in written["findings"])
        return cls(**{**written, "findings": findings})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skew:
    """How far a node's clock is ahead of that of rank 0's node."""

    seconds: float
    uncertainty_seconds: float
    """Half the time of the question and its answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllReduce:
    """An all-reduce over all ranks of one node, or of two."""

    nodes: tuple[str, ...]
    ranks: int
    error: str | None = None
    """Why there are no times."""
    right: bool = True
    bytes: int = 0
    seconds: float = 0.0
    """Of the slowest rank, as is the latency."""
    latency_seconds: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Measurements:
    """Everything, by the name of the node. What could not be measured is missing, and `silent` says of whom."""

    world_size: int
    limit: float
    """Seconds that a step was given."""
    folder: str
    missing_ranks: list[int] = dataclasses.field(default_factory=list)
    """Ranks that never came."""
    missing_hosts: list[str] = dataclasses.field(default_factory=list)
    """Hosts of the job on which nothing came, where the scheduler names them."""
    nodes: list[Node] = dataclasses.field(default_factory=list)
    silent: dict[str, str] = dataclasses.field(default_factory=dict)
    """Nodes that stopped answering, and during what."""
    descriptions: dict[str, Description] = dataclasses.field(default_factory=dict)
    errors: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    """(node, what) of measurements that failed, and why."""
    skews: dict[str, Skew] = dataclasses.field(default_factory=dict)
    files: dict[str, Finding] = dataclasses.field(default_factory=dict)
    folder_seen: dict[str, bool] = dataclasses.field(default_factory=dict)
    """Whether rank 0's file was there, on the other nodes."""
    backend: str = "gloo"
    inside: list[AllReduce] = dataclasses.field(default_factory=list)
    """Each node by itself."""
    pairs: list[AllReduce] = dataclasses.field(default_factory=list)
