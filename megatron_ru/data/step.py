"""A step of the pipeline: how many tasks it has, and a function from a task number to files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ru.data.config import PipelineConfig
from megatron_ru.data.outcome import Outcome
from megatron_ru.data.run import Run
from megatron_ru.foundation.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Step:
    """Its tasks depend on nothing but the files of earlier steps, and not on each other."""

    place: int
    """Steps run in the order of their places."""

    version: int
    """Raised when the same settings give other files: what lies there is then made again."""

    wanted: Callable[[PipelineConfig], bool]
    """Whether the config asks for it."""

    settings: Callable[[PipelineConfig], Any]
    """The part of the config that its files depend on, beside what earlier steps depend on."""

    tasks: Callable[[Run], int]
    """How many there are; earlier steps are done by then."""

    run: Callable[[Run, int], Outcome]
    """One task: writes files into `run.step_folder(name)`, each whole or not at all."""


STEPS: Registry[Step] = Registry("data step", package="megatron_ru.data.steps")


def wanted_steps(config: PipelineConfig) -> list[tuple[str, Step]]:
    """(name, step) of what the config asks for, in order."""
    return sorted(((name, step) for name, step in STEPS.items() if step.wanted(config)), key=lambda pair: pair[1].place)
