import time

import pytest

from megatron_ru.plugin.step_clock import StepClock, StepTime, summary, warm_up_steps


def test_parts_of_a_step():
    clock = StepClock("cpu")
    for step in (1, 2):
        clock.begin()
        time.sleep(0.02)
        clock.between()
        time.sleep(0.01)
        clock.end(step)
    first, second = clock.times()
    assert first.since_previous is None
    for one in (first, second):
        assert 0.02 <= one.forward_backward < one.whole - 0.01
    assert second.since_previous >= first.whole


def test_a_backward_that_is_run_again():
    clock = StepClock("cpu")
    clock.begin()
    clock.between()
    time.sleep(0.01)
    clock.between()
    clock.end(1)
    [one] = clock.times()
    assert one.forward_backward >= 0.01


def test_a_step_that_ends_before_its_backward_is_none():
    clock = StepClock("cpu")
    clock.begin()
    clock.end(1)
    assert clock.times() == []


def step(number, whole, forward_backward=1.0):
    return StepTime(step=number, forward_backward=forward_backward, whole=whole, since_previous=whole + 0.5)


def test_medians_without_warm_up_and_traced_steps():
    times = [step(number, 100.0) for number in range(1, 6)]
    times += [step(6, 2.0), step(7, 3.0), step(8, 4.0), step(9, 50.0), step(10, 5.0, 2.0)]
    found = summary(times, range(9, 10))
    assert (found["warm_up_steps"], found["timed_steps"]) == (3, 6)
    times = [step(number, 100.0) for number in range(1, 16)]
    times[5:9] = [step(6, 2.0), step(7, 3.0), step(8, 4.0), step(9, 50.0)]
    found = summary(times, range(9, 16))
    assert (found["warm_up_steps"], found["timed_steps"]) == (5, 3)
    assert found["step_seconds"] == 3.0
    assert found["forward_backward_seconds"] == 1.0
    assert found["update_seconds"] == 2.0
    assert found["begin_to_begin_seconds"] == 3.5


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (3, 1), (9, 3), (15, 5), (1000, 5)])
def test_a_short_run_has_a_short_warm_up(steps, expected):
    assert warm_up_steps(steps) == expected


def test_nothing_measured():
    assert summary([]) == {"timed_steps": 0, "warm_up_steps": 0}
