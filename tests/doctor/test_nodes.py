"""Ranks into nodes, and nodes into pairs."""

import itertools

import pytest

from megatron_ru.doctor.nodes import Arrival, nodes_of, rounds


def arrivals(*places):
    return {rank: Arrival(rank=rank, host=host, local_rank=local) for rank, (host, local) in enumerate(places)}


def test_nodes_of_blocks_and_of_ranks_dealt_in_turn():
    blocks = nodes_of(arrivals(("a", 0), ("a", 1), ("b", 0), ("b", 1)))
    assert [(node.name, node.ranks) for node in blocks] == [("a", (0, 1)), ("b", (2, 3))]
    dealt = nodes_of(arrivals(("a", 0), ("b", 0), ("a", 1), ("b", 1)))
    assert [(node.name, node.ranks, node.leader) for node in dealt] == [("a", (0, 2), 0), ("b", (1, 3), 1)]


def test_one_local_rank_twice_on_a_host_is_two_nodes():
    found = nodes_of(arrivals(("a", 0), ("a", 0), ("b", 0)))
    assert [(node.name, node.host) for node in found] == [("a", "a"), ("a (rank 1)", "a"), ("b", "b")]


def test_missing_ranks_leave_smaller_nodes():
    places = arrivals(("a", 0), ("a", 1), ("b", 0), ("b", 1))
    del places[0], places[3]
    assert [(node.name, node.ranks) for node in nodes_of(places)] == [("a", (1,)), ("b", (2,))]


@pytest.mark.parametrize("count", range(10))
def test_everybody_meets_everybody_once(count):
    names = [f"n{number}" for number in range(count)]
    found = rounds(names)
    assert len(found) == (0 if count < 2 else count - 1 + count % 2)
    # As many at once as there can be, and nobody twice.
    assert all(len(pairs) == count // 2 for pairs in found)
    assert all(len({name for pair in pairs for name in pair}) == 2 * len(pairs) for pairs in found)
    assert sorted(itertools.chain(*found)) == sorted(itertools.combinations(names, 2))
