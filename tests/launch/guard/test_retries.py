import pytest

from megatron_ru.launch.guard.retries import after, code_of, short
from megatron_ru.launch.guard.verdict import Verdict


def failure(code=7, host="n1", step=5, fault="exit"):
    return Verdict(fault=fault, code=code, rank=1, host=host, step=step, why="x")


STALL = failure(75, fault="stall")


def test_nothing_follows_what_went_well():
    assert not after([Verdict(fault="none", code=0)], most=3, back_off=5).again


def test_a_host_that_cannot_be_reached_is_worth_another_start():
    lost, unreached = failure(75, fault="lost"), Verdict(fault="launcher", code=255, why="x")
    assert code_of([lost, unreached]) == 75
    assert code_of([lost, unreached, unreached]) == 75
    # A launcher that fails for no such reason says what is wrong itself.
    assert code_of([unreached]) == 255
    assert code_of([failure(), unreached]) == 255
    assert code_of([lost, failure()]) == 7


def test_the_pause_doubles_up_to_a_minute():
    pauses = [after([STALL] * count, most=9, back_off=5).pause for count in range(1, 7)]
    assert pauses == [5, 10, 20, 40, 60, 60]


@pytest.mark.parametrize(
    ("verdicts", "more", "again", "why"),
    [
        ([STALL], {}, True, ""),
        ([STALL], {"most": 0}, False, ""),
        ([STALL] * 3, {"most": 2}, False, "that was the last of 3 attempts"),
        ([STALL], {"signalled": "SIGUSR1"}, False, "SIGUSR1 asked for an end, so there is no other attempt here"),
        ([failure(2)], {}, False, "code 2 means bad input, and another attempt would not change it"),
        ([failure(), failure()], {}, False,
         "code 7 came twice after step 5, so another attempt would only come to the same place"),
        ([failure(step=-1), failure(step=-1)], {}, False,
         "code 7 came twice with no step done, so another attempt would only come to the same place"),
        # Somewhere else, by another code, or not by a code of its own: chance may have had a hand in it.
        ([failure(host="a"), failure(step=6, host="b")], {}, True, ""),
        ([failure(host="a"), failure(8, host="b")], {}, True, ""),
        ([failure(137, "a", fault="killed"), failure(137, "b", fault="killed")], {}, True, ""),
        ([failure(host="a"), STALL, failure(host="b")], {}, True, ""),
    ],
)  # fmt: skip
def test_whether_another_attempt_follows(verdicts, more, again, why):
    retry = after(verdicts, **{"most": 9, "back_off": 1, **more})
    assert (retry.again, retry.why) == (again, why)


@pytest.mark.parametrize(
    ("hosts", "more", "left_out", "why"),
    [
        (["n1"], {"spares": 1}, (), ""),
        (["n1", "n1"], {"spares": 1}, ("n1",), "n1 was to blame 2 times and is left out from now on"),
        (["n1", "n2", "n1.cluster"], {"spares": 1}, ("n1",), "n1 was to blame 2 times and is left out from now on"),
        (["n1", "n1"], {}, (), "n1 was to blame 2 times and stays, since there is no spare host"),
        (
            ["n1", "n1"],
            {"spares": 2, "fixed": "n1.x"},
            (),
            "n1 was to blame 2 times and stays, since the ranks meet there",
        ),
        (
            ["n1", "n1", "n2", "n2"],
            {"spares": 1},
            ("n1",),
            "n2 was to blame 2 times and stays, since there is no spare host",
        ),
        (["n1", "n1", "n2", "n2"], {"spares": 2}, ("n1", "n2"), "n2 was to blame 2 times and is left out from now on"),
        (["n1", "n1", "n2"], {"spares": 2}, ("n1",), ""),
        (["", ""], {"spares": 1}, (), ""),
    ],
)
def test_hosts_that_are_left_out(hosts, more, left_out, why):
    verdicts = [failure(75, host, fault="stall") for host in hosts]
    retry = after(verdicts, most=9, back_off=1, **more)
    assert (retry.again, retry.left_out, retry.why) == (True, left_out, why)


@pytest.mark.parametrize(
    ("faults", "left_out"),
    [
        # A launcher that cannot reach the host that was just lost.
        (["lost n1", "launcher"], ("n1",)),
        (["lost n1", "launcher", "launcher"], ("n1",)),
        (["lost n1", "exit n2", "launcher"], ()),
        (["launcher", "launcher"], ()),
        (["launcher", "lost n1"], ()),
    ],
)
def test_a_launcher_that_fails_after_a_loss_failed_to_reach_that_host(faults, left_out):
    told = [fault.partition(" ") for fault in faults]
    verdicts = [failure(75 if host else 255, host, step=number, fault=fault)
                for number, (fault, _, host) in enumerate(told)]  # fmt: skip
    assert after(verdicts, most=9, back_off=1, spares=1).left_out == left_out


def test_short_names():
    assert [short(name) for name in ("n1", "n1.cluster.jp", "10.0.0.1")] == ["n1", "n1", "10.0.0.1"]
