"""A named curve."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points in the order of x. Raises ValueError when the lengths differ."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name}: {len(self.x)} x for {len(self.y)} y")


def running_mean(series: Series, window: int) -> Series:
    """The mean of each value and up to `window` - 1 before it, under the same name."""
    values = [
        sum(part) / len(part) for end in range(1, len(series.y) + 1) if (part := series.y[max(0, end - window) : end])
    ]
    return Series(name=series.name, x=series.x, y=tuple(values))
