"""What a renderer is: a pure function from a JobSpec to a script, and what its machine can take."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.registry import Registry
from megatron_ru.launch.job_spec import JobSpec

# Fields that only some targets can honour, and how the command line spells them.
OPTIONAL_FIELDS = {
    "time": "--time",
    "group": "--group",
    "queue": "--queue",
    "cpus_per_task": "--cpus-per-task",
    "container": "--container",
    "output": "--output",
    "array": "--array",
    "dependency": "--dependency",
    "requeue": "--requeue",
    "signal": "--signal",
    "interfaces": "--interfaces",
    "hostfile": "--hostfile",
    "torchrun": "--torchrun",
    "spares": "--spares",
}


@dataclass(frozen=True, kw_only=True)
class LaunchScript:
    """A rendered script and what to do with it."""

    text: str
    submit: tuple[str, ...]
    """The command that reads the script on its standard input, or `bash`, which reads it as a file."""
    check: tuple[str, ...] | None = None
    """The command that judges the script, read on its standard input, without starting anything."""

    @property
    def content(self) -> bytes:
        """Exactly what is shown and sent."""
        return self.text.encode()


Renderer = Callable[[JobSpec], LaunchScript]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A place that jobs go to."""

    name: str
    summary: str
    """One line: scheduler and machine."""
    gpus_per_node: int
    """GPUs of a node, taken where the user gives no number."""
    whole_nodes: bool
    """Whether a job has all GPUs of its nodes, so that no other number is right."""
    most_nodes: int | None
    takes: frozenset[str]
    """Which of OPTIONAL_FIELDS the scheduler can honour."""
    needs: tuple[str, ...]
    """Which of them it cannot do without."""
    renderer: Renderer

    def render(self, job: JobSpec) -> LaunchScript:
        """The script for `job`. Raises UserError for what this target cannot take."""
        self._check(job)
        return self.renderer(job)

    def _check(self, job: JobSpec) -> None:
        if self.whole_nodes and job.gpus_per_node != self.gpus_per_node:
            raise UserError(
                f"a node of {self.name} has {self.gpus_per_node} GPUs and is given whole, not {job.gpus_per_node} of "
                f"them: drop --gpus-per-node or say {self.gpus_per_node}"
            )
        if self.most_nodes is not None and job.all_nodes > self.most_nodes:
            raise UserError(f"{self.name} gives a job at most {self.most_nodes} nodes, not {job.all_nodes}: take fewer")
        defaults = {field.name: field.default for field in dataclasses.fields(JobSpec)}
        for field, flag in OPTIONAL_FIELDS.items():
            value = getattr(job, field)
            if value != defaults[field] and field not in self.takes:
                able = ", ".join(name for name, target in TARGETS.items() if field in target.takes)
                raise UserError(f"{self.name} can do nothing with {flag} ({value}): drop it, or go to one of {able}")
            if not value and field in self.needs:
                raise UserError(f"{self.name} takes no job without {flag}: add it")


TARGETS: Registry[Target] = Registry("target", package="megatron_ru.launch.targets")


def target(
    name: str,
    summary: str,
    *,
    gpus_per_node: int,
    takes: tuple[str, ...],
    needs: tuple[str, ...] = (),
    whole_nodes: bool = False,
    most_nodes: int | None = None,
) -> Callable[[Renderer], Renderer]:
    """A decorator that registers a renderer under `name` and returns it unchanged."""

    def add(renderer: Renderer) -> Renderer:
        TARGETS.register(name)(
            Target(
                name=name,
                summary=summary,
                gpus_per_node=gpus_per_node,
                whole_nodes=whole_nodes,
                most_nodes=most_nodes,
                takes=frozenset(takes),
                needs=needs,
                renderer=renderer,
            )
        )
        return renderer

    return add
