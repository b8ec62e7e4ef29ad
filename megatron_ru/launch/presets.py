"""Known-good settings of a training command, by name, and the parallel sizes that a command asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.registry import Registry

PARALLEL_FLAGS = {"--tensor-model-parallel-size": "tensor", "--pipeline-model-parallel-size": "pipeline"}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Flags of Megatron that belong together."""

    name: str
    """The word for --preset."""
    reason: str
    """One sentence: what they are for."""
    flags: Mapping[str, str]
    """Each flag with its value."""

    def applied_to(self, command: Sequence[str]) -> tuple[str, ...]:
        """The command with those flags behind it that it lacks.

        Raises UserError where it has one with another value.
        """
        missing: list[str] = []
        for flag, value in self.flags.items():
            given = flag_value(command, flag)
            if given is None:
                missing += [flag, value]
            elif given != value:
                raise UserError(
                    f"the command says {flag} {given}, preset {self.name} {flag} {value}: drop the flag or the preset"
                )
        return (*command, *missing)


PRESETS: Registry[Preset] = Registry("preset")


def flag_value(command: Sequence[str], flag: str) -> str | None:
    """The last value that `flag VALUE` or `flag=VALUE` gives in the command; None where it is absent."""
    found = None
    for index, word in enumerate(command):
        if word == flag:
            found = command[index + 1] if index + 1 < len(command) else ""
        elif word.startswith(f"{flag}="):
            found = word[len(flag) + 1 :]
    return found


def parallel_size(command: Sequence[str], flag: str) -> int:
    """The parallel size that the command asks for; 1 where it says nothing or what is no number."""
    value = flag_value(command, flag)
    return int(value) if value is not None and value.isascii() and value.isdigit() else 1


PRESETS.register("13b_v100")(
    Preset(
        name="13b_v100",
        reason="13 billion parameters on V100s of 16 GB: 32 of them, 8 nodes of ABCI V, hold one model",
        flags={
            "--micro-batch-size": "1",
            "--tensor-model-parallel-size": "4",
            "--pipeline-model-parallel-size": "8",
            "--recompute-granularity": "full",
            "--recompute-method": "uniform",
            "--recompute-num-layers": "1",
        },
    )
)
