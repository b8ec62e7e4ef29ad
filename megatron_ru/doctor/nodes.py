"""Which ranks share a node, and in which order pairs of nodes meet."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a rank says when it comes."""

    rank: int
    host: str
    local_rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A host and its ranks."""

    name: str
    """The host's, with a rank behind it where a host has several nodes."""
    host: str
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        """The rank that speaks for the node."""
        return self.ranks[0]


def nodes_of(arrivals: Mapping[int, Arrival]) -> list[Node]:
    """The nodes by their lowest rank.

    Two ranks of one host with the same local rank are on nodes of their own, as several containers of a machine are;
    the later ones are named with their rank.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    seen: dict[tuple[str, int], int] = {}
    for rank, arrival in sorted(arrivals.items()):
        number = seen.get((arrival.host, arrival.local_rank), 0)
        seen[arrival.host, arrival.local_rank] = number + 1
        groups.setdefault((arrival.host, number), []).append(rank)
    return sorted(
        (
            Node(name=host if number == 0 else f"{host} (rank {ranks[0]})", host=host, ranks=tuple(ranks))
            for (host, number), ranks in groups.items()
        ),
        key=lambda node: node.leader,
    )


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Rounds in which everybody meets everybody once and nobody twice at a time: N - 1 for even N, N for odd.

    The circle method: one stays, the others move on by a place; with an odd number the one who stays is nobody.
    """
    circle: list[str | None] = [*names] if len(names) % 2 == 0 else [*names, None]
    place = {name: number for number, name in enumerate(names)}
    if len(names) < 2:
        return []
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        both = [(first, second) for first, second in pairs if first is not None and second is not None]
        found.append([pair if place[pair[0]] < place[pair[1]] else (pair[1], pair[0]) for pair in both])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found
