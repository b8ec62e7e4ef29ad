"""The choice of what is recomputed, on costs with known answers."""

import pytest

from megatron_ru.models.recompute_plan import WHOLE, Cost, choose, cost_table, micro_batches_in_flight

NOTHING = Cost(way=(), kept=100, seconds=10.0)
MLP = Cost(way=("mlp",), kept=40, seconds=12.0)
ATTENTION = Cost(way=("core_attn",), kept=90, seconds=13.0)
LAYER = Cost(way=WHOLE, kept=10, seconds=14.0)
COSTS = [NOTHING, ATTENTION, MLP, LAYER]


def counts(plan):
    return {cost.name: layers for cost, layers in plan.parts}


@pytest.mark.parametrize(
    ("budget", "expected", "added"),
    [
        (800, {"nothing": 8}, 0),
        # 1 byte too little: the cheapest way of freeing it is one mlp.
        (799, {"mlp": 1, "nothing": 7}, 2),
        (700, {"mlp": 2, "nothing": 6}, 4),
        # One layer more of the best way is never dearer than the next way.
        (320, {"mlp": 8}, 16),
        (319, {"whole layer": 1, "mlp": 7}, 18),
        (80, {"whole layer": 8}, 32),
    ],
)
def test_the_cheapest_that_fits(budget, expected, added):
    plan = choose(COSTS, 8, 1, budget)
    assert counts(plan) == expected
    assert plan.seconds == added
    assert plan.fits
    assert plan.kept == sum(cost.kept * layers for cost, layers in plan.parts) <= budget


def test_no_mix_of_two_ways_is_cheaper():
    for budget in range(80, 810, 10):
        plan = choose(COSTS, 8, 1, budget)
        mixes = [
            count * (one.seconds - 10) + (8 - count) * (other.seconds - 10)
            for one in COSTS for other in COSTS for count in range(9)
            if count * one.kept + (8 - count) * other.kept <= budget
        ]  # fmt: skip
        assert plan.seconds == min(mixes)


def test_less_memory_recomputes_more_layers():
    plans = [choose([NOTHING, LAYER], 16, 1, budget) for budget in range(1600, 150, -10)]
    whole = [counts(plan).get("whole layer", 0) for plan in plans]
    assert whole == sorted(whole)
    assert set(whole) == set(range(17))
    # With all ways the price rises, and so never stops the memory from falling.
    assert (costs := [choose(COSTS, 16, 1, budget).seconds for budget in range(1600, 150, -10)]) == sorted(costs)


def test_each_micro_batch_in_flight_keeps_activations():
    assert counts(choose(COSTS, 8, 2, 1600)) == {"nothing": 8}
    plan = choose(COSTS, 8, 2, 800)
    assert plan.kept == 2 * sum(cost.kept * layers for cost, layers in plan.parts) <= 800
    assert counts(plan) == {"mlp": 7, "nothing": 1}


def test_what_cannot_fit_keeps_least_and_says_so():
    plan = choose(COSTS, 8, 1, 79)
    assert counts(plan) == {"whole layer": 8}
    assert not plan.fits


def test_a_way_that_seems_faster_than_none_is_not_taken_for_that():
    lucky = Cost(way=("core_attn",), kept=90, seconds=9.9)
    assert counts(choose([NOTHING, lucky, MLP, LAYER], 8, 1, 800)) == {"nothing": 8}
    assert counts(choose([NOTHING, lucky, MLP, LAYER], 8, 1, 799)) == {"core_attn": 1, "nothing": 7}


def test_whole_layers_come_first_as_megatron_recomputes_them():
    plan = choose(COSTS, 8, 1, 200)
    assert plan.ways == [WHOLE] * 4 + [("mlp",)] * 4
    # Even where they keep no less.
    small = Cost(way=("mlp",), kept=10, seconds=14.0)
    mixed = choose([NOTHING, Cost(way=WHOLE, kept=10, seconds=13.0), small], 3, 1, 120)
    assert mixed.ways == [WHOLE, WHOLE, ()]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"stage": 0, "stages": 1, "micro_batches": 8}, 1),
        ({"stage": 0, "stages": 4, "micro_batches": 8}, 4),
        ({"stage": 3, "stages": 4, "micro_batches": 8}, 1),
        ({"stage": 0, "stages": 4, "micro_batches": 2}, 2),
        # Two chunks: 2·3 + 1·4 warm-up passes of a chunk and one more.
        ({"stage": 0, "stages": 4, "micro_batches": 8, "chunks": 2}, 11),
        ({"stage": 3, "stages": 4, "micro_batches": 8, "chunks": 2}, 5),
        ({"stage": 0, "stages": 4, "micro_batches": 4, "chunks": 2}, 8),
        ({"stage": 0, "stages": 2, "micro_batches": 8, "chunks": 2, "group": 3}, 6),
    ],
)
def test_micro_batches_in_flight(schedule, expected):
    assert micro_batches_in_flight(**schedule) == expected


def test_the_table_gives_the_price_of_a_gib():
    costs = [Cost(way=(), kept=3 << 30, seconds=0.010), Cost(way=WHOLE, kept=1 << 30, seconds=0.014)]
    rows = cost_table(costs).splitlines()
    assert rows[0].split("  ") == ["computed again", "MiB a layer", "ms a layer", "ms per GiB freed"]
    assert rows[2].split() == ["nothing", "3072", "10", "–"]
    assert rows[3].split() == ["whole", "layer", "1024", "14", "2"]


def test_the_decision_in_words():
    assert choose(COSTS, 8, 1, 200).sentence.startswith("whole layer in 4, mlp in 4 of 8 layers: ")
    assert choose(COSTS, 8, 1, 200).document() == {
        "layers": {"whole layer": 4, "mlp": 4}, "in_flight": 1, "activation_bytes": 200, "budget_bytes": 200,
        "added_seconds": 24.0,
    }  # fmt: skip
