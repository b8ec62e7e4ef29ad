"""From what a guard has seen to who was to blame, case by case."""

import pytest

from megatron_ru.launch.guard.ranks import Ranks, RankSeen
from megatron_ru.launch.guard.verdict import Limits, judge, trouble

NOW = 1000.0
LIMITS = Limits(stall=100.0, start=500.0, grace=10.0)
GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:5000"
COLLECTIVE = ("/lib/torch/distributed/distributed_c10d.py:2806 in all_reduce", "/train.py:5 in step")


def rank(number, **fields):
    """A rank that trains well, but for `fields`."""
    well = {"host": f"n{number}", "started": 1.0, "heard": NOW, "beats": 50, "step": 20, "phase": 1, "idle": 0.2}
    return RankSeen(**{"rank": number, **well, **fields})


def ranks(*seen, world=None):
    return Ranks(world=len(seen) if world is None else world, seen={one.rank: one for one in seen})


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, None),
        ({"idle": 99.0}, None),
        ({"idle": 101.0}, "stall"),
        # In evaluation and saving too.
        ({"idle": 101.0, "phase": 3}, "stall"),
        # Whoever starts has longer.
        ({"idle": 101.0, "phase": 0, "started": NOW - 499}, None),
        ({"idle": 1.0, "phase": 0, "started": NOW - 501}, "start"),
        # A command that never beats has no limit.
        ({"idle": 900.0, "phase": 0, "beats": 0, "started": 1.0}, None),
        ({"heard": NOW - 99}, None),
        ({"heard": NOW - 101}, "lost"),
        ({"cut": NOW - 9}, None),
        ({"cut": NOW - 11}, "lost"),
        ({"ended": NOW - 900, "code": 0, "heard": NOW - 900, "cut": NOW - 899}, None),
        ({"ended": NOW - 1, "code": 75}, None),
        ({"ended": NOW - 1, "code": 2}, "exit"),
        ({"ended": NOW - 1, "code": 137}, "exit"),
    ],
)
def test_trouble(fields, found):
    assert trouble(ranks(rank(0), rank(1, **fields)), LIMITS, NOW) == found


def test_an_explicit_start_limit_holds_for_all():
    limits = Limits(stall=100.0, start=500.0, start_for_all=True)
    silent = rank(1, beats=0, phase=0, started=NOW - 501)
    assert trouble(ranks(rank(0), silent), limits, NOW) == "start"
    assert trouble(ranks(rank(0), world=2), limits, NOW) == "start"
    assert trouble(ranks(rank(0), world=2), limits, 499.0) is None
    # And when nobody comes at all.
    assert trouble(ranks(), limits, NOW) == "start"
    assert trouble(ranks(), LIMITS, NOW) is None


STALLED = {"idle": 101.0, "frames": COLLECTIVE}
HANGS = {
    "exited, though also lost, stopped and slow ones are there": (
        [rank(0, **STALLED), rank(1, idle=102.0, heard=NOW - 50), rank(2, idle=101.0, letter="T"),
         rank(3, ended=900.0, code=0, step=19)],
        ("early exit", 3, 75, "exited with code 0 while the others went on"),
    ),
    "no answer": (
        [rank(0, **STALLED), rank(1, idle=90.0, heard=NOW - 50), rank(2, idle=101.0, letter="T")],
        ("lost", 1, 75, "does not answer: nothing was heard of it for 50 s"),
    ),
    "line cut": (
        [rank(0, **STALLED), rank(1, idle=90.0, heard=NOW - 7, cut=NOW - 6)],
        ("lost", 1, 75, "does not answer: its line is cut for 7.0 s"),
    ),
    "stopped": (
        [rank(0, **STALLED, step=10), rank(1, idle=101.0, letter="T")],
        ("stopped", 1, 75, "is stopped (state T) without a beat for 101 s"),
    ),
    "elsewhere than the others": (
        [rank(0, **STALLED, step=10), rank(1, idle=101.0, frames=("/data.py:7 in read", "/train.py:5 in step")),
         rank(2, **STALLED)],
        ("stall", 1, 75, "hangs without a beat for 101 s (limit 100 s), in /data.py:7 in read"),
    ),
    "elsewhere, where all others wait at a place that says nothing of a collective": (
        [rank(0, idle=101.0, frames=("/train.py:50 in log",)), rank(1, idle=101.0, frames=("/train.py:51 in log",)),
         rank(2, idle=101.0, frames=("/data.py:7 in read",))],
        ("stall", 2, 75, "hangs without a beat for 101 s (limit 100 s), in /data.py:7 in read"),
    ),
    "all in the collective: lowest step": (
        [rank(0, **STALLED), rank(1, **STALLED, step=19), rank(2, **STALLED)],
        ("stall", 1, 75, f"hangs without a beat for 101 s (limit 100 s), in {COLLECTIVE[0]}"),
    ),
    "all the same: the longest without a beat": (
        [rank(0, idle=101.0), rank(1, idle=101.0), rank(2, idle=103.0)],
        ("stall", 2, 75, "hangs without a beat for 103 s (limit 100 s)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HANGS)
def test_the_culprit_of_a_hang(case):
    seen, expected = HANGS[case]
    verdict = judge(ranks(*seen), LIMITS, NOW, what="stall", launcher=None)
    assert (verdict.fault, verdict.rank, verdict.code, verdict.why) == expected


def failed(number, code, at, **fields):
    return rank(number, ended=at, code=code, heard=at, **fields)


FAILURES = {
    "first in time": (
        [failed(0, 1, 900.5), failed(1, 7, 900.0), failed(2, 1, 901.0)],
        ("exit", 1, 7, "exited with code 7"),
    ),
    "killed": ([rank(0), failed(1, 137, 900.0)], ("killed", 1, 137, "was killed by SIGKILL (code 137)")),
    "a signal without a name": ([failed(0, 250, 9.0)], ("killed", 0, 250, "was killed by signal 122 (code 250)")),
    "with its exception": (
        [failed(1, 1, 900.0, exception="ValueError: no", where="a.py:3 in f"), failed(0, 1, 900.1, exception=GLOO)],
        ("exit", 1, 1, "ended by ValueError: no at a.py:3 in f (code 1)"),
    ),
    "who blames a peer is not to blame": (
        [failed(0, 1, 900.0, exception=GLOO), failed(1, 9, 900.3)],
        ("exit", 1, 9, "exited with code 9"),
    ),
    "unless nobody else has failed by then": (
        [failed(0, 1, 900.0, exception=GLOO), failed(1, 9, 950.0)],
        ("exit", 0, 1, f"ended by {GLOO} (code 1)"),
    ),
    "a peer that left early": (
        [failed(0, 1, 900.0, exception=GLOO), rank(1, ended=899.0, code=0)],
        ("early exit", 1, 1, "exited with code 0 while the others went on"),
    ),
    "a stopped peer": (
        [failed(0, 1, 900.0, exception="DistBackendError: NCCL watchdog timeout"), rank(1, letter="T", idle=80.0)],
        ("stopped", 1, 75, "is stopped without a beat for 80 s"),
    ),
    "a lost peer": (
        [failed(0, 1, 900.0, exception=GLOO), rank(1, heard=880.0)],
        ("lost", 1, 75, "does not answer: nothing was heard of it for 120 s"),
    ),
    "a launcher ends the others when it has lost a host": (
        [failed(0, 143, 900.0), rank(1, heard=880.0)],
        ("lost", 1, 75, "does not answer: nothing was heard of it for 120 s"),
    ),
    "a failure of its own beside a lost peer": (
        [failed(0, 3, 900.0), rank(1, heard=880.0)],
        ("exit", 0, 3, "exited with code 3"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ["exit", None])
@pytest.mark.parametrize("case", FAILURES)
def test_the_first_failure(case, what):
    seen, expected = FAILURES[case]
    # The launcher's own code says less than those of the ranks.
    verdict = judge(ranks(*seen), LIMITS, NOW, what=what, launcher=1)
    assert (verdict.fault, verdict.rank, verdict.code, verdict.why) == expected


ENDS = {
    "well": ([rank(0, ended=9.0, code=0)], 0, ("none", None, 0)),
    "the launcher says otherwise": ([rank(0, ended=9.0, code=0)], 5, ("launcher", None, 5)),
    "the launcher hides a code": ([rank(0, ended=9.0, code=5)], 0, ("exit", 0, 5)),
    "without keepers": ([], 205, ("launcher", None, 205)),
    "without keepers, well": ([], 0, ("none", None, 0)),
    "saved": ([rank(0, ended=9.0, code=75), rank(1, ended=8.0, code=75)], 75, ("saved", 1, 75)),
    "saved, and the launcher killed who was not as quick": (
        [rank(0, ended=9.0, code=143), rank(1, ended=8.0, code=75)],
        75,
        ("saved", 1, 75),
    ),
    "killed before somebody saved": (
        [rank(0, ended=7.0, code=137), rank(1, ended=8.0, code=75)],
        137,
        ("killed", 0, 137),
    ),
    "a host is gone": ([rank(0, ended=9.0, code=0), rank(1, heard=900.0)], 205, ("lost", 1, 75)),
    "a host is gone, and the launcher does not mind": ([rank(1, heard=900.0)], 0, ("none", None, 0)),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_end_of_the_launcher(case):
    seen, launcher, expected = ENDS[case]
    verdict = judge(ranks(*seen), LIMITS, NOW, what=None, launcher=launcher)
    assert (verdict.fault, verdict.rank, verdict.code) == expected


def test_a_launcher_that_does_not_end():
    verdict = judge(ranks(rank(0, ended=9.0, code=0)), LIMITS, NOW, what="launcher", launcher=None)
    assert (verdict.fault, verdict.code) == ("launcher", 75)


def test_ranks_that_never_came():
    verdict = judge(ranks(rank(0), rank(3), world=5), LIMITS, NOW, what="start", launcher=None)
    assert (verdict.fault, verdict.rank, verdict.why) == ("start", 1, "did not come within 500 s, nor did 2 others")
    assert judge(ranks(), LIMITS, NOW, what="start", launcher=None).why == "did not come within 500 s"


def test_limits_follow_the_stall_limit():
    assert (Limits().pause, Limits().answer, Limits().cut) == (1.0, 4.0, 10.0)
    assert Limits(stall=2.0).pause == pytest.approx(0.4)
    assert Limits(stall=2.0).cut == 2.0
