from megatron_ru.benchmarks.report import markdown, summary, write_json, write_markdown, write_plot
from megatron_ru.benchmarks.result import OURS, Missing, Report
from tests.benchmarks.test_result import accuracy, row, timing


def report(*rows, **changes):
    values = {
        "command": "megatron-ru bench ops", "date": "2026-11-24T00:00:00+00:00", "device": "cuda",
        "device_name": "H200", "environment": {"torch": "2.11.0", "driver": "580"}, "ceiling": 200.0,
        "peers": {"liger": "0.8.5"}, "rows": rows, "seconds": 61.0, "cases": 1,
    }  # fmt: skip
    return Report(**{**values, **changes})


def lines_of(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_summary_sets_ours_beside_the_fastest_peer():
    text = summary(
        report(
            row(host_microseconds=6.25), row("Liger", both=150.0), row("torch", both=300.0), row("Liger", case="9x9")
        )
    )
    lines = lines_of(text)
    assert "rms_norm 8x4 bfloat16 40.0 60.0 100.0 50/50/50 1.0e-03 / 2.0e-03 1.50× Liger (150.0)" in lines
    assert "faster than every peer in 1 of 1 cases; least: rms_norm 8x4, 1.50 times Liger" in lines
    assert "host, µs for a forward call: rms_norm 6.2" in lines
    assert lines[-1] == "timed: queued; percent of a copy's 200 GB/s by the fewest bytes; 61 s"


def test_summary_says_who_failed_and_why_once():
    failed = [row("TE", case=f"{n}x4", status="failed", note="no kernel", both=None) for n in range(5)]
    text = summary(report(row(), *failed, row("Apex", status="unsupported", note="has no z loss")))
    assert "TE: failed: no kernel (rms_norm 0x4, rms_norm 1x4, rms_norm 2x4 and others)" in text
    assert "z loss" not in text


def test_slower_is_not_called_faster():
    text = summary(report(row(), row("Liger", both=80.0)))
    assert "faster than every peer in 0 of 1 cases; least: rms_norm 8x4, 0.80 times Liger" in text


def test_one_pass_has_no_backward_percent():
    one = row(op="cross_entropy", bytes_backward=0, backward=timing(1.0), both=42.0)
    assert "50/–/48" in summary(report(one))


def test_matrix_products_are_told_in_operations():
    assert "50 TFLOP/s" in summary(report(row(flops=5 * 10**9)))


def test_markdown_has_everybody():
    text = markdown(
        report(
            row(extra_bytes=350_000_000), row("Liger", both=150.0),
            row("TE", status="failed", note="a | b", both=None, forward=None, backward=None, accuracy=None),
        )
    )  # fmt: skip
    assert "- command: `megatron-ru bench ops`\n" in text
    assert "- driver: 580\n" in text
    assert "- copy ceiling: 200 GB/s" in text
    assert "\n## rms_norm\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| 8x4 bfloat16 |")]
    assert rows[0] == (
        "| 8x4 bfloat16 | megatron_ru | 40.0 | 60.0 | 100.0 | 100 | 50/50/50 | 1.0e-03 / 2.0e-03 | 0.5 / 0.75 "
        "| 350 MB | 1.00 |  |"
    )
    assert "| Liger | 40.0 | 60.0 | 150.0 | 67 | 50/50/33 |" in rows[1]
    assert "| 1.50 |" in rows[1]
    assert rows[2] == "| 8x4 bfloat16 | TE | – | – | – | – | failed | – | – | – | – | failed: a \\| b |"
    assert "| rms_norm | 8x4 | 100.0 | Liger | 150.0 | 1.50 | 40.0 / 40.0 | 1.00 | 60.0 / 60.0 | 1.00 |" in text


def test_comparison_shows_the_pass_that_a_peer_wins():
    text = markdown(report(row(), row("torch.compile", both=97.0, forward=timing(30.0), backward=timing(66.0))))
    assert (
        "| rms_norm | 8x4 | 100.0 | torch.compile | 97.0 | 0.97 | 40.0 / 30.0 | 0.75 | 60.0 / 66.0 | 1.10 |"
    ) in text
    text = markdown(report(row(backward=None, both=None), row("torch", backward=None, both=None)))
    assert "| rms_norm | 8x4 | 40.0 | torch | 40.0 | 1.00 | 40.0 / 40.0 | 1.00 | – | – |" in text


def test_what_is_missing_is_said():
    def gone(number):
        return Missing(op="rope", case=f"{number}x4", contenders=(OURS,), in_part=False)

    cut = Missing(op="rms_norm", case="8x4", contenders=("torch.compile",), in_part=True)
    part = report(row(), row("Liger"), cases=12, missing=(cut, *map(gone, range(9))))
    text = summary(part)
    assert (
        "interrupted, 10 of 12 cases missing: rms_norm 8x4 (without torch.compile), rope 0x4, rope 1x4, rope 2x4, "
        "rope 3x4, rope 4x4 and 4 others"
    ) in text
    assert "faster than every peer" not in text
    assert "rms_norm 8x4 bfloat16 40.0 60.0" in "\n".join(lines_of(text))
    # The page names them all.
    assert "rope 8x4\n" in markdown(part)
    assert "- interrupted, 10 of 12 cases missing: rms_norm 8x4 (without" in markdown(part)
    assert "missing" not in summary(report(row())) + markdown(report(row()))


def test_nothing_measured_is_a_table_without_rows():
    gone = Missing(op="rope", case="8x4", contenders=(OURS,), in_part=False)
    assert "interrupted, 1 of 1 cases missing: rope 8x4" in summary(report(missing=(gone,)))


def test_wrong_peer_is_in_the_table_and_not_the_fastest():
    text = markdown(report(row(), row("Liger", both=10.0, note="wrong beyond", accuracy=accuracy(good=False))))
    assert "| Liger | 40.0 | 60.0 | 10.0 |" in text
    assert "| wrong beyond |" in text
    assert "| rms_norm | 8x4 |" not in text


def test_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    whole = report(row(), row("Liger", both=150.0))
    write_json(whole, tmp_path / "new" / "ops.json")
    write_markdown(whole, tmp_path / "ops.md")
    write_plot(whole, tmp_path / "ops.png")
    assert f'"contender": "{OURS}"' in (tmp_path / "new" / "ops.json").read_text(encoding="utf-8")
    assert (tmp_path / "ops.md").read_text(encoding="utf-8") == markdown(whole)
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
