"""What a decision about a checkpoint needs of the other ranks."""

from typing import Protocol


class Ranks(Protocol):
    """The ranks of a run, which call these together and in the same order."""

    rank: int
    size: int

    def first[Value](self, value: Value) -> Value:
        """Rank 0's value, on every rank."""

    def all[Value](self, value: Value) -> list[Value]:
        """Every rank's value, on every rank."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def first[Value](self, value: Value) -> Value:
        return value

    def all[Value](self, value: Value) -> list[Value]:
        return [value]
