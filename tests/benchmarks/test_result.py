import json

import pytest

from megatron_ru.benchmarks.result import OURS, Accuracy, Missing, Pair, Report, Row, Timing, compare


def timing(microseconds):
    return Timing(microseconds=microseconds, low=microseconds, high=microseconds, repeats=3, iterations=10)


def accuracy(good=True):
    return Accuracy(output=1e-3, gradient=2e-3, ulps=0.5, gradient_ulps=0.75, of_limit=0.25 if good else 3.0, good=good)


def row(contender=OURS, both=100.0, **changes):
    values = {
        "op": "rms_norm", "case": "8x4", "dtype": "bfloat16", "contender": contender, "status": "ok",
        "timed": "queued", "forward": timing(40.0), "backward": timing(60.0),
        "both": None if both is None else timing(both),
        "bytes_forward": 4_000_000, "bytes_backward": 6_000_000, "accuracy": accuracy(),
    }  # fmt: skip
    return Row(**{**values, **changes})


def test_timing_is_the_median_of_repeats_for_one_call():
    found = Timing.of([4e-3, 1e-3, 2e-3, 8e-3, 3e-3], iterations=10)
    assert (found.microseconds, found.low, found.high) == pytest.approx((300.0, 200.0, 400.0))
    assert (found.repeats, found.iterations) == (5, 10)
    # Between two neighbours, half way.
    assert Timing.of([1e-6, 3e-6], iterations=1).microseconds == pytest.approx(2.0)
    assert Timing.of([5e-6], iterations=1).high == pytest.approx(5.0)


def test_bandwidth_and_percent():
    one = row()
    assert one.bandwidth("forward") == pytest.approx(100.0)
    assert one.bandwidth("backward") == pytest.approx(100.0)
    assert one.bandwidth("both") == pytest.approx(100.0)
    assert one.percent("both", 400.0) == pytest.approx(25.0)
    assert row(both=50.0).bandwidth("both") == pytest.approx(200.0)


def test_pass_without_bytes_or_time_has_no_bandwidth():
    """Cross entropy in one pass moves nothing in the backward."""
    one = row(bytes_backward=0, both=None)
    assert one.bandwidth("backward") is None
    assert one.percent("both", 100.0) is None
    assert one.whole().microseconds == 40.0


def test_operations_a_second():
    assert row(flops=5 * 10**9).tflops() == pytest.approx(50.0)
    assert row().tflops() is None


def test_ours_is_compared_with_the_fastest_that_is_right():
    rows = [
        row(both=100.0),
        row("slow", both=300.0),
        row("fast", both=150.0),
        row("wrong", both=10.0, accuracy=accuracy(good=False)),
        row("failed", both=None, forward=None, backward=None, status="failed", note="no"),
        # Others' cases do not mix.
        row("fast", both=20.0, case="16x4"),
    ]
    (found,) = compare(rows)
    assert (found.op, found.case, found.peer) == ("rms_norm", "8x4", "fast")
    assert found.ratio == pytest.approx(1.5)


def test_passes_are_compared_with_those_of_the_same_peer():
    rows = [
        row(both=100.0),
        row("fast", both=90.0, forward=timing(50.0), backward=timing(45.0)),
        # Faster forward, slower together.
        row("slow", both=300.0, forward=timing(1.0)),
    ]
    (found,) = compare(rows)
    assert found.peer == "fast"
    assert (found.forward, found.backward) == (Pair(ours=40.0, theirs=50.0), Pair(ours=60.0, theirs=45.0))
    assert (found.forward.ratio, found.backward.ratio) == pytest.approx((1.25, 0.75))
    (found,) = compare([row(backward=None, both=None), row("fast", backward=None, both=None)])
    assert (found.backward, found.json()["backward"]) == (None, None)


def test_ours_that_is_wrong_is_not_compared():
    assert compare([row(accuracy=accuracy(good=False)), row("fast")]) == []
    assert compare([row()]) == []


def test_json_has_words_for_what_is_no_number():
    nan = float("nan")
    wrong = Accuracy(output=nan, gradient=None, ulps=float("inf"), gradient_ulps=None, of_limit=nan, good=False)
    report = Report(
        command="", date="", device="cpu", device_name="", environment={}, ceiling=1.0, peers={}, seconds=0.0,
        rows=(row(accuracy=wrong),), cases=1,
    )  # fmt: skip
    found = json.loads(json.dumps(report.json(), allow_nan=False))
    assert (found["rows"][0]["accuracy"]["output"], found["rows"][0]["accuracy"]["ulps"]) == ("nan", "inf")


def test_json_holds_what_follows_from_the_numbers():
    report = Report(
        command="megatron-ru bench ops", date="2026-11-24T00:00:00+00:00", device="cuda", device_name="H200",
        environment={"torch": "2.11.0"}, ceiling=200.0, peers={"liger": "0.8.5", "te": "not installed"},
        rows=(row(), row("Liger", both=125.0), row("TE", status="failed", note="no kernel", both=None)), seconds=12.34,
        cases=1,
    )  # fmt: skip
    found = json.loads(json.dumps(report.json()))
    assert found["schema"] == 1
    assert found["copy_ceiling_gb_s"] == 200.0
    assert found["peers"]["te"] == "not installed"
    first, second, third = found["rows"]
    assert first["percent_of_ceiling"] == {"forward": 50.0, "backward": 50.0, "both": 50.0}
    assert first["forward"]["microseconds"] == 40.0
    assert second["gb_s"]["both"] == pytest.approx(80.0)
    assert (third["status"], third["note"], third["gb_s"]["both"]) == ("failed", "no kernel", None)
    assert found["comparisons"] == [
        {
            "op": "rms_norm", "case": "8x4", "ours": 100.0, "peer": "Liger", "theirs": 125.0, "ratio": 1.25,
            "forward": {"ours": 40.0, "theirs": 40.0, "ratio": 1.0},
            "backward": {"ours": 60.0, "theirs": 60.0, "ratio": 1.0},
        }
    ]  # fmt: skip
    assert found["run_seconds"] == 12.3
    assert (found["cases"], found["missing"]) == (1, [])


def test_case_cut_short_is_not_compared():
    """Who is missing may be the fastest."""
    cut = Missing(op="rms_norm", case="8x4", contenders=("torch.compile",), in_part=True)
    untouched = Missing(op="rope", case="8x4", contenders=(OURS, "torch.compile"), in_part=False)
    report = Report(
        command="", date="", device="cpu", device_name="", environment={}, ceiling=1.0, peers={}, seconds=0.0,
        rows=(row(), row("Liger", both=150.0), row(case="9x9"), row("Liger", case="9x9")),
        cases=3, missing=(cut, untouched),
    )  # fmt: skip
    assert [one.case for one in report.comparisons()] == ["9x9"]
    assert list(map(str, report.missing)) == ["rms_norm 8x4 (without torch.compile)", "rope 8x4"]
    found = json.loads(json.dumps(report.json()))
    assert len(found["rows"]) == 4
    assert found["missing"][0] == {
        "op": "rms_norm", "case": "8x4", "contenders": ["torch.compile"], "in_part": True,
    }  # fmt: skip
