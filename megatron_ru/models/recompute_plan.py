"""What a pipeline stage computes again in backward passes: the cheapest way whose activations fit. Arithmetic alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ru.figures.text_table import text_table

WHOLE = ("layer",)
"""The way of a layer that keeps its input alone."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One way to train a layer, as it was measured on one micro-batch."""

    way: tuple[str, ...]
    """What is computed again: names of Megatron's `--recompute-modules`, or `WHOLE`; empty for nothing."""
    kept: int
    """Bytes that wait for the backward pass."""
    seconds: float
    """Forward and backward."""

    @property
    def name(self) -> str:
        """The way in words."""
        return "whole layer" if self.way == WHOLE else "+".join(self.way) or "nothing"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The way of each layer of a model chunk."""

    parts: tuple[tuple[Cost, int], ...]
    """Ways and how many layers go each of them; those that keep least come first, as Megatron begins there."""
    in_flight: int
    budget: int
    """Bytes."""
    seconds: float
    """What recomputation adds to a micro-batch in this chunk."""

    @property
    def kept(self) -> int:
        """Bytes of activations when most micro-batches wait."""
        return self.in_flight * sum(cost.kept * layers for cost, layers in self.parts)

    @property
    def fits(self) -> bool:
        """Whether that is within the budget."""
        return self.kept <= self.budget

    @property
    def ways(self) -> list[tuple[str, ...]]:
        """The way of each layer, from the first on."""
        return [cost.way for cost, layers in self.parts for _ in range(layers)]

    @property
    def sentence(self) -> str:
        """The decision in words."""
        chosen = ", ".join(f"{cost.name} in {layers}" for cost, layers in self.parts)
        return (
            f"{chosen} of {len(self.ways)} layers: {self.kept / _GIB:.3g} GiB of activations with {self.in_flight} "
            f"in flight, {self.budget / _GIB:.3g} GiB are free for them; {1e3 * self.seconds:+.3g} ms a micro-batch"
        )

    def document(self) -> dict[str, Any]:
        """The same for a line of JSON."""
        return {
            "layers": {cost.name: layers for cost, layers in self.parts},
            "in_flight": self.in_flight,
            "activation_bytes": self.kept,
            "budget_bytes": self.budget,
            "added_seconds": self.seconds,
        }


def choose(costs: Sequence[Cost], layers: int, in_flight: int, budget: int) -> Plan:
    """The plan with the least added time among those within `budget` bytes, and where none is, the one that keeps
    least. The first of `costs` is that of nothing recomputed.

    A plan mixes two ways at most: between the two best ways by cost per byte lies the optimum, up to a layer.
    """
    # What recomputes and seems faster than what does not is noise.
    added = {cost: max(0.0, cost.seconds - costs[0].seconds) for cost in costs}
    plans = []
    for one in costs:
        for other in costs:
            for count in range(1, layers + 1):
                parts = [(one, count), (other, layers - count)] if one != other else [(one, layers)]
                parts.sort(key=lambda part: (part[0].kept, part[0].way != WHOLE))
                seconds = sum(added[cost] * number for cost, number in parts)
                parts = [part for part in parts if part[1]]
                plans.append(Plan(parts=tuple(parts), in_flight=in_flight, budget=budget, seconds=seconds))

    def price(plan: Plan) -> tuple[float, int, int]:
        return plan.seconds, sum(number for cost, number in plan.parts if cost.way), plan.kept

    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=price) if fitting else min(plans, key=lambda plan: (plan.kept, *price(plan)))


def micro_batches_in_flight(
    *, stage: int, stages: int, micro_batches: int, chunks: int = 1, group: int | None = None
) -> int:
    """Forward passes of one model chunk that wait for their backward on this pipeline stage at the most: one forward,
    one backward, with `chunks` virtual stages interleaved in groups of `group` micro-batches (Narayanan et al. 2021,
    arXiv:2104.04473, 2.2)."""
    if stages == 1:
        return 1
    ahead = stages - stage - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * (group or stages)
    return min(ahead + 1, micro_batches * chunks)


def cost_table(costs: Sequence[Cost]) -> str:
    """The measured costs, the way that recomputes nothing first."""
    nothing = costs[0]
    rows = []
    for cost in costs:
        freed, added = nothing.kept - cost.kept, cost.seconds - nothing.seconds
        price = f"{1e3 * added / (freed / _GIB):.4g}" if freed > 0 else "–"
        rows.append((cost.name, f"{cost.kept / 2**20:.4g}", f"{1e3 * cost.seconds:.4g}", price))
    return text_table(("computed again", "MiB a layer", "ms a layer", "ms per GiB freed"), rows, right=(1, 2, 3))
