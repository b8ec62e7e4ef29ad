"""What every contender has to do, as a value that travels to its process. Nothing here needs torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.models.step_flops import Shape, shape_of_variant
from megatron_ru.models.variant import Variant, find_variant

# Steps under the profiler, at the end, where it disturbs no other.
TRACED = 3
# The contender that is no competitor.
ROOF = "roof"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shape, one batch, a number of steps."""

    variant: str
    layers: int
    sequence: int
    micro_batch: int
    steps: int
    device: str
    """`cuda` or `cpu`."""
    seed: int = 7
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("sequence", 1), ("micro_batch", 1), ("steps", TRACED + 3)):
            if getattr(self, name) < least:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least {least}; give a larger one"
                )

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.micro_batch * self.sequence

    @property
    def traced(self) -> range:
        """The steps whose kernels are recorded."""
        return range(self.steps - TRACED + 1, self.steps + 1)

    def architecture(self) -> Variant:
        """The variant at these sizes."""
        variant = find_variant(self.variant)
        positions = max(self.sequence, variant.position_count)
        return dataclasses.replace(
            variant, num_layers=self.layers, seq_length=self.sequence, max_position_embeddings=positions
        )

    def shape(self) -> Shape:
        """The sizes that decide what a step costs."""
        return shape_of_variant(self.architecture())

    def json(self) -> dict[str, Any]:
        """For another process; `Task(**json)` is the same task."""
        return dataclasses.asdict(self)


def check_llama(variant: Variant) -> None:
    """Raises `UserError` for a variant that the peers do not build: they are LLaMAs with two embedding matrices."""
    wanted = {
        "positions": "rope", "rotary_percent": 1.0, "norm": "rmsnorm", "norm_placement": "pre", "activation": "swiglu",
        "bias": False, "tied_embeddings": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip
    for name, value in wanted.items():
        found = getattr(variant, name)
        if found != value:
            raise UserError(
                f"variant {variant.name} has {name} {found!r}, and the peers of `bench train` have {value!r}: "
                "choose a LLaMA such as ru_7b3, or --against none"
            )
